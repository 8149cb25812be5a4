"""What a decoder keeps from token to token, found by running it on a few tokens; what has no form is refused."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.kv import KVGeometry, LayerKV, State
from vlmexport.split.decoder import text_decoder
from vlmexport.split.expanded import expanded_kv, refuse_more
from vlmexport.split.per_layer import text_arguments
from vlmexport.split.sharing import find_sources
from vlmexport.split.states import kept_states

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

_TOKENS = 2


def find_cache(vlm: VLM) -> KVGeometry:
    """Run the decoder on a few tokens and look at its cache.

    Raises `UnsupportedModelError` naming the first layer that keeps something else than keys and values
    ``[B, kv heads, T, head dim]`` or a state that `kept_states` knows (keys of another shape, nothing), or the family
    when no layer at all keeps keys and values. Layers that keep something smaller, of which they make their keys and
    values again in every call, are taken as keeping those (`expanded_kv`).
    """
    from transformers import DynamicCache

    family, kv, decoder = vlm.facts.model_type, vlm.facts.kv, text_decoder(vlm.model)
    past = DynamicCache(config=decoder.config)
    if past.layers and not any(hasattr(layer, "keys") for layer in past.layers):
        raise UnsupportedModelError(
            f"{family}: no layer of the decoder keeps keys and values; such decoders are not supported yet"
        )
    embeds = torch.zeros(1, _TOKENS, vlm.facts.hidden_size, dtype=decoder.dtype)
    with torch.no_grad():
        decoder(inputs_embeds=embeds, past_key_values=past, use_cache=True, **text_arguments(decoder, 1, _TOKENS))
    kinds: Any = getattr(decoder.config.get_text_config(), "layer_types", None) or [""] * kv.layers
    sources = find_sources(decoder)
    found: list[LayerKV | None] = []
    states: list[State] = []
    expanded: dict[int, LayerKV] | None = None
    for index in range(kv.layers):
        layer = past.layers[index] if index < len(past.layers) else None
        what = f"{family}: layer {index}" + (f" ({kinds[index]})" if kinds[index] else "")
        refuse_more(what, layer)
        of_layer = kept_states(what, index, layer)
        states += of_layer
        keeps_none = index in sources or (of_layer and getattr(layer, "keys", None) is None)
        if not keeps_none and _keeps_latents(layer):
            expanded = expanded_kv(vlm) if expanded is None else expanded
            found.append(expanded[index] if index in expanded else _layer_kv(what, layer))
        else:
            found.append(None if keeps_none else _layer_kv(what, layer))
    if all(layer == LayerKV(kv.heads, kv.head_dim) for layer in found):
        return dataclasses.replace(kv, states=tuple(states))
    return dataclasses.replace(kv, per_layer=tuple(found), states=tuple(states))


def _keeps_latents(layer: Any) -> bool:
    """Has what `layer` keeps under the names of keys and values their axes, but other sizes for each?"""
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    keys, values = (tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else () for tensor in tensors)
    return keys != values and all(len(shape) == 4 and shape[2] == _TOKENS for shape in (keys, values))


def _layer_kv(what: str, layer: Any) -> LayerKV:
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    if any(not isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise UnsupportedModelError(
            f"{what} of the decoder keeps no keys and values of its own, or a state of a form that is not supported yet"
        )
    keys, values = (tuple(tensor.shape) for tensor in tensors if tensor is not None)
    if len(keys) != 4 or keys != values or (keys[0], keys[2]) != (1, _TOKENS):
        raise UnsupportedModelError(
            f"{what} of the decoder keeps keys and values of the shapes {keys} and {values}, expected "
            f"(1, heads, {_TOKENS}, head dim) for both"
        )
    return LayerKV(keys[1], keys[3])
