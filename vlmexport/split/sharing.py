"""Layers that read the keys and values of an earlier layer, found by running the decoder."""

from __future__ import annotations

from typing import Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.attention import attention_implementation
from vlmexport.split.per_layer import text_arguments

_TOKENS = 2


def find_sources(decoder: Any) -> dict[int, int]:
    """For each layer whose attention gets the very keys and values of an earlier one: that layer's index.

    Raises `UnsupportedModelError` for a layer that reads the keys of one layer and the values of another.
    """
    watch = SharedKeys()

    def look(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kw: Any) -> Any:
        watch.source(int(getattr(module, "layer_idx", -1)), key, value)
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[-1]), None

    hidden = decoder.config.get_text_config().hidden_size
    embeds = torch.zeros(1, _TOKENS, hidden, dtype=decoder.dtype)
    with torch.no_grad(), attention_implementation(decoder, "vlmexport_sources", look):
        decoder(inputs_embeds=embeds, use_cache=False, **text_arguments(decoder, 1, _TOKENS))
    return watch.sources


class SharedKeys:
    """Which layer made the keys and values that reach an attention, by identity; it holds on to all of them."""

    def __init__(self) -> None:
        self.sources: dict[int, int] = {}
        self._made: dict[int, tuple[int, Any, Any]] = {}

    def source(self, layer: int, key: Any, value: Any) -> int | None:
        """The earlier layer whose keys and values these are; None when they are `layer`'s own."""
        made = self._made.setdefault(id(key), (layer, key, value))
        if made[0] == layer:
            return None
        if made[2] is not value:
            raise UnsupportedModelError(
                f"layer {layer} of the decoder reads the keys of layer {made[0]} with other values; such a "
                "layer has no form yet"
            )
        self.sources[layer] = made[0]
        return made[0]
