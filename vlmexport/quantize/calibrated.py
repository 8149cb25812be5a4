"""The calibrated algorithms behind one face each: how far to move scales, and how to round what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmexport.quantize.awq import awq_scale, output_error, some_rows
from vlmexport.quantize.clip import clipped_grid
from vlmexport.quantize.gptq import Factor, factorize, round_gptq
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.rtn import rtn_grid
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.smoothquant import smooth_scale
from vlmexport.quantize.statistics import InputStatistics
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import quantize_data_free

_COMPENSATING = ("gptq", "awq+gptq")


@dataclass(frozen=True)
class RoundingReport:
    """How one weight was rounded.

    `error`: output error over output power on the calibration tokens, ``tr(E M E^T) / tr(W M W^T)`` (the power, and
    without GPTQ the error too, of at most 256 evenly spaced rows); `damping`: the
    share of the mean diagonal that was added (0 where none is); `dead_columns`: input features that were always zero;
    `fallback`: why the algorithm gave way to round-to-nearest ("" when it did not); `shrinkage`: the share of the
    features' correlation that GPTQ took for chance (near 1: more calibration tokens would help).
    """

    error: float
    damping: float = 0.0
    dead_columns: int = 0
    fallback: str = ""
    shrinkage: float = 0.0


def search_scale(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, schemes: Sequence[QuantScheme]
) -> torch.Tensor | None:
    """Factors ``s [K]`` (float32, positive) for all `weights` ``[N_i, K]`` that read the same input.

    The caller stores ``W * s`` and divides what makes the input by `s`. None when the schemes' algorithm does not move
    scales, or when no factor is better than none. SmoothQuant's factors are used when any scheme asks for them.
    """
    if any(scheme.algorithm == "smoothquant" for scheme in schemes):
        return smooth_scale(weights, statistics)
    if any(algorithm(scheme.algorithm).smooths for scheme in schemes):
        return awq_scale(weights, statistics, schemes)
    return None


def quantize_calibrated(
    weight: torch.Tensor, statistics: InputStatistics, scheme: QuantScheme, name: str = "weight"
) -> tuple[QuantizedTensor, RoundingReport]:
    """Codes of ``weight [N, K]`` (folds already applied) by `scheme`'s algorithm, and how it went.

    Raises `BadInputError` for NaN, infinity, and a group size that does not divide K.
    """
    return quantize_group([weight], statistics, [scheme], [name])[0]


def quantize_group(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    schemes: Sequence[QuantScheme],
    names: Sequence[str],
) -> list[tuple[QuantizedTensor, RoundingReport]]:
    """`quantize_calibrated` of several ``weights [N_i, K]`` that read the same input, factorised once for all.

    Raises `BadInputError` for NaN, infinity, and a group size that does not divide K.
    """
    compensating = any(scheme.algorithm in _COMPENSATING for scheme in schemes)
    factor = factorize(statistics) if compensating else "not needed"
    return [
        _compensated(weight, statistics, scheme, name, factor)
        if scheme.algorithm in _COMPENSATING
        else _nearest(weight, statistics, scheme, name)
        for weight, scheme, name in zip(weights, schemes, names, strict=True)
    ]


def _compensated(
    weight: torch.Tensor, statistics: InputStatistics, scheme: QuantScheme, name: str, factor: Factor | str
) -> tuple[QuantizedTensor, RoundingReport]:
    if isinstance(factor, str):
        made = rtn_grid(weight, scheme, name).nearest(weight)
        return made, RoundingReport(_share(made, weight, statistics), fallback=factor)
    grid = clipped_grid(weight, statistics, scheme, name) if scheme.clip else rtn_grid(weight, scheme, name)
    codes, error = round_gptq(weight, grid, factor)
    share = _ratio(error, _power(weight, statistics))
    return grid.quantized(codes), RoundingReport(share, factor.damping, factor.dead, shrinkage=factor.shrinkage)


def _nearest(
    weight: torch.Tensor, statistics: InputStatistics, scheme: QuantScheme, name: str
) -> tuple[QuantizedTensor, RoundingReport]:
    if not algorithm(scheme.algorithm).calibrated:
        made = quantize_data_free(weight, scheme, name)
    elif scheme.clip:
        made = clipped_grid(weight, statistics, scheme, name).nearest(weight)
    else:
        made = rtn_grid(weight, scheme, name).nearest(weight)
    return made, RoundingReport(_share(made, weight, statistics))


def _share(made: QuantizedTensor, weight: torch.Tensor, statistics: InputStatistics) -> float:
    """Output error over output power of `made` in place of `weight`, of some of their rows."""
    rows = some_rows(weight)
    error = output_error(some_rows(made.dequantize()).sub_(rows), statistics.moment)
    return _ratio(error, output_error(rows, statistics.moment))


def _power(weight: torch.Tensor, statistics: InputStatistics) -> float:
    """Output power of ``weight [N, K]``, from that of some of its rows."""
    rows = some_rows(weight)
    part = float(rows.square().sum())
    return output_error(rows, statistics.moment) * float(weight.float().square().sum()) / part if part else 0.0


def _ratio(error: float, power: float) -> float:
    """The share; 0 where there is no output at all (nothing can be lost then)."""
    return error / power if power > 0 else 0.0
