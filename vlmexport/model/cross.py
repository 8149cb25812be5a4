"""What a decoder attends to beside its own tokens: names of the graph inputs, and masks by token and tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

KEY_VALUES = "cross_key_values"
STATES = "cross_attention_states"
TILE_MASK = "cross_attention_mask"
STATE_MASK = "encoder_attention_mask"
# Values of a `TILE_MASK`: the token sees the tile, does not see it, and there is no such tile (padding of a batch).
SEEN, HIDDEN, MISSING = 1, 0, -1


def cross_names(layer: int) -> tuple[str, str]:
    """The decoder graph's inputs of one layer's keys and values, ``[B, heads, T, head_dim]`` each."""
    return f"{KEY_VALUES}.{layer}.key", f"{KEY_VALUES}.{layer}.value"


def reached_tiles(mask: torch.Tensor, tile_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which states each token sees, bool ``[B, 1, S, tiles * tile_tokens]``, and whether it sees any, ``[B, 1, S, 1]``.

    `mask` int64 ``[B, S, tiles]`` holds `SEEN`, `HIDDEN` and `MISSING`. A token that sees no tile attends to all there
    are (and its layer's MLP is left out); where there is none at all, to what is there instead.
    """
    rows = (mask == SEEN).any(dim=-1, keepdim=True)
    there = (mask != MISSING) | (mask == MISSING).all(dim=-1, keepdim=True)
    seen = ((mask == SEEN) | (~rows & there)).repeat_interleave(tile_tokens, dim=-1)
    return seen[:, None], rows[:, None]


def tile_mask(given: NDArray[Any]) -> NDArray[np.int64]:
    """A processor's mask ``[1, S, images, tiles]`` as the decoder takes it, ``[1, S, images * tiles]``."""
    return given.reshape(*given.shape[:2], -1).astype(np.int64)
