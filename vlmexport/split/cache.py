"""What a decoder keeps from token to token, found by running it on a few tokens; what has no form is refused."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.kv import KVGeometry, LayerKV
from vlmexport.split.decoder import text_decoder

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

_TOKENS = 2


def find_cache(vlm: VLM) -> KVGeometry:
    """Run the decoder on a few tokens and look at its cache.

    Raises `UnsupportedModelError` naming the first layer that keeps something else than keys and values
    ``[B, kv heads, T, head dim]`` (the state of a convolution or of linear attention, keys of another shape, nothing).
    """
    from transformers import DynamicCache

    family, kv, decoder = vlm.facts.model_type, vlm.facts.kv, text_decoder(vlm.model)
    past = DynamicCache(config=decoder.config)
    embeds = torch.zeros(1, _TOKENS, vlm.facts.hidden_size, dtype=decoder.dtype)
    with torch.no_grad():
        decoder(inputs_embeds=embeds, past_key_values=past, use_cache=True)
    kinds: Any = getattr(decoder.config.get_text_config(), "layer_types", None) or [""] * kv.layers
    found = []
    for index in range(kv.layers):
        layer = past.layers[index] if index < len(past.layers) else None
        kind = f" ({kinds[index]})" if kinds[index] else ""
        found.append(_layer_kv(f"{family}: layer {index}{kind}", layer))
    if all(layer == LayerKV(kv.heads, kv.head_dim) for layer in found):
        return kv
    return dataclasses.replace(kv, per_layer=tuple(found))


def _layer_kv(what: str, layer: Any) -> LayerKV:
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    if any(not isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise UnsupportedModelError(
            f"{what} of the decoder keeps no keys and values of its own but another state, "
            "or shares another layer's; only decoders that keep them in every layer are supported yet"
        )
    keys, values = (tuple(tensor.shape) for tensor in tensors if tensor is not None)
    if len(keys) != 4 or keys != values or (keys[0], keys[2]) != (1, _TOKENS):
        raise UnsupportedModelError(
            f"{what} of the decoder keeps keys and values of the shapes {keys} and {values}, expected "
            f"(1, heads, {_TOKENS}, head dim) for both"
        )
    return LayerKV(keys[1], keys[3])
