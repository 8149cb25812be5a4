"""What a model does to the logits of its head: it sets those of some tokens to the lowest number, or scales all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.split.decoder import DecoderCall

# Two factors, or logits by one, that differ by less are the same but for rounding (of bfloat16 at most).
_SAME_SCALE = 1e-2


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


@dataclass(frozen=True)
class LogitScale:
    """Logits are those of the head times `factor`, or divided by it where it `divides`."""

    factor: float
    divides: bool = False

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` of the head, scaled, in their own type."""
        return logits / self.factor if self.divides else logits * self.factor


def find_logit_scale(config: Any, raw: torch.Tensor, wanted: torch.Tensor) -> LogitScale | None:
    """The number that makes `wanted` of the head's logits `raw`, both ``[B, S, vocab]``; None where it is 1 or none.

    A number that `config` (of the text model) holds is preferred to the measured one: it is exact.
    """
    raw, wanted = shown(raw), shown(wanted)
    if raw.shape != wanted.shape or torch.equal(raw, wanted):
        return None
    given, found = raw.double(), wanted.double()
    measured = float((given * found).sum() / given.square().sum().clamp_min(1e-30))
    if not measured > 0 or abs(measured - 1) <= _SAME_SCALE:
        return None
    tried = [*_held(config, measured), LogitScale(measured)]
    best = min(tried, key=lambda scale: float((scale.apply(raw) - wanted).abs().max()))
    worst = float((best.apply(raw).double() - found).abs().max() / found.abs().max())
    return best if worst <= _SAME_SCALE else None


def _held(config: Any, measured: float) -> Iterator[LogitScale]:
    """The numbers of `config` that may be meant by a `measured` factor."""
    values = {float(v) for v in config.to_dict().values() if isinstance(v, int | float) and v > 0}
    for value in sorted(values):
        for scale, factor in ((LogitScale(value), value), (LogitScale(value, divides=True), 1 / value)):
            if abs(factor / measured - 1) <= _SAME_SCALE:
                yield scale


def shown(logits: torch.Tensor) -> torch.Tensor:
    """`logits` with zeros for hidden tokens, which would drown every difference of the others."""
    if not logits.is_floating_point():
        return logits
    return logits.masked_fill(logits == torch.finfo(logits.dtype).min, 0.0)
