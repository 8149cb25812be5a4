"""What a decoder keeps from token to token: keys and values of one shape, or the model is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.decoder import text_decoder

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

_TOKENS = 2


def check_cache(vlm: VLM) -> None:
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
    for index in range(kv.layers):
        layer = past.layers[index] if index < len(past.layers) else None
        found = [getattr(layer, name, None) for name in ("keys", "values")]
        kind = f" ({kinds[index]})" if kinds[index] else ""
        if any(not isinstance(tensor, torch.Tensor) for tensor in found):
            raise UnsupportedModelError(
                f"{family}: layer {index}{kind} of the decoder keeps no keys and values of its own but another state, "
                "or shares another layer's; only decoders that keep them in every layer are supported yet"
            )
        shapes = [tuple(tensor.shape) for tensor in found if tensor is not None]
        if any(shape != (1, kv.heads, _TOKENS, kv.head_dim) for shape in shapes):
            raise UnsupportedModelError(
                f"{family}: layer {index}{kind} of the decoder keeps keys and values of the shapes {shapes[0]} and "
                f"{shapes[1]}, expected (1, {kv.heads}, {_TOKENS}, {kv.head_dim}) in every layer"
            )
