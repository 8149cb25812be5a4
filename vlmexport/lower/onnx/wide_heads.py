"""Attention whose keys and values have heads of different sizes, as one in which they are equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmexport.lower.onnx import neutral


def wide_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, settings: dict[str, Any]
) -> torch.Tensor:
    """Emit ``Attention`` of one layer, ``[batch, sequence, heads, values' head size]``.

    Heads that are narrower get zeros behind them: these add nothing to a score, and what comes of them is cut off.
    `settings` are the operator's attributes, its scale among them.
    """
    width, wanted = max(key.shape[-1], value.shape[-1]), value.shape[-1]
    if key.shape[-1] == wanted:
        return neutral.attention(query, key, value, layer, **settings)
    given = [nn.functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query, key, value)]
    return neutral.attention(given[0], given[1], given[2], layer, **settings)[..., :wanted]
