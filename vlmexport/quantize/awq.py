"""AWQ: scales that give the features which matter finer levels (arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputStatistics

_INPUT_POWERS = tuple(step / 10 for step in range(11))
_WEIGHT_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Rows of each weight that a candidate is judged on.
_ROWS = 256
_FINALISTS = 4


def awq_scale(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, schemes: Sequence[QuantScheme]
) -> torch.Tensor | None:
    """Factors ``s [K]`` (float32, positive) for the columns of all ``weights [N_i, K]``, or None when 1 is as good.

    The caller stores ``W * s`` and divides the input by `s`. Candidates are ``mean|x|^a / mean|w|^b``; with b = 1 and
    a = 1 they undo a scale that a training run or another fold had moved from the input into the weight. The loss is
    exact on a subset of rows: ``trace(E moment E^T)``, E the error of ``W * s`` rounded to nearest and divided by `s`.
    """
    if not bool((statistics.absolute > 0).any()):
        return None
    rows = [some_rows(weight) for weight in weights]
    shares = [weight.shape[0] / row.shape[0] for weight, row in zip(weights, rows, strict=True)]
    inputs = _floored(statistics.mean_absolute())
    magnitude = _floored(_column_magnitude(weights))
    power = statistics.moment.diagonal()
    live = statistics.absolute > 0
    candidates = [_centred(inputs**a / magnitude**b, live) for a in _INPUT_POWERS for b in _WEIGHT_POWERS if a or b]

    def loss(scale: torch.Tensor, metric: torch.Tensor) -> float:
        return sum(
            share * output_error(_rounding_error(row, scale, scheme), metric)
            for share, row, scheme in zip(shares, rows, schemes, strict=True)
        )

    candidates.sort(key=lambda scale: loss(scale, power))
    best, best_loss = None, loss(torch.ones_like(inputs), statistics.moment)
    for scale in candidates[:_FINALISTS]:
        exact = loss(scale, statistics.moment)
        if exact < best_loss:
            best, best_loss = scale, exact
    return best


def output_error(error: torch.Tensor, metric: torch.Tensor) -> float:
    """``trace(E M E^T)`` of ``error [N, K]`` for the moment ``[K, K]``, or for its diagonal ``[K]`` alone."""
    if metric.ndim == 1:
        return float(error.square().sum(0) @ metric)
    total = torch.zeros((), device=error.device)
    for start in range(0, error.shape[0], 1024):
        part = error[start : start + 1024]
        total += (part @ metric).mul_(part).sum()
    return float(total)


def some_rows(weight: torch.Tensor) -> torch.Tensor:
    """At most `_ROWS` evenly spaced rows, float32."""
    step = max(1, weight.shape[0] // _ROWS)
    return weight[::step][:_ROWS].float()


def _rounding_error(weight: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    return quantize_rtn(weight * scale, scheme).dequantize().div_(scale).sub_(weight)


def _column_magnitude(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean ``|w|`` per input feature over all weights, float32 ``[K]``."""
    total = torch.stack([weight.float().abs().sum(0) for weight in weights]).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def _floored(magnitude: torch.Tensor) -> torch.Tensor:
    """`magnitude` with nearly silent features raised to a 1000th of the mean, so that no factor explodes."""
    return magnitude.clamp_min(max(float(magnitude.mean()) * 1e-3, 1e-12))


def _centred(scale: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """`scale` times the number that makes its largest and smallest multiply to 1; 1 where the samples were silent."""
    centre = (scale[live].max() * scale[live].min()).sqrt()
    return torch.where(live, scale / centre, torch.ones_like(scale))
