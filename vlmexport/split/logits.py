"""Tokens that a model never writes: those whose logits it sets to the lowest number of their type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmexport.split.decoder import DecoderCall


@dataclass(frozen=True)
class HiddenTokens:
    """Token ids whose logits are `value`, whatever the head gives."""

    ids: tuple[int, ...]
    value: float

    def hide(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` ``[..., vocab]`` with those of the hidden tokens at `value`."""
        return logits.index_fill(-1, torch.tensor(self.ids), self.value)


def find_hidden_tokens(calls: Sequence[DecoderCall]) -> HiddenTokens | None:
    """The tokens whose logits are the lowest number of their type at every position of every call; None for none."""
    lowest = torch.finfo(calls[0].logits.dtype).min
    hidden = torch.stack([(call.logits == lowest).all(dim=(0, 1)) for call in calls]).all(dim=0)
    ids = tuple(hidden.nonzero()[:, 0].tolist())
    return HiddenTokens(ids, lowest) if ids else None


def shown(logits: torch.Tensor) -> torch.Tensor:
    """`logits` with zeros for hidden tokens, which would drown every difference of the others."""
    if not logits.is_floating_point():
        return logits
    return logits.masked_fill(logits == torch.finfo(logits.dtype).min, 0.0)
