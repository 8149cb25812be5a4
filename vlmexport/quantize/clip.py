"""A smaller range per group: what the largest weights lose, the others gain."""

from __future__ import annotations

import dataclasses

import torch

from vlmexport.quantize.grid import Grid, nearest_codes
from vlmexport.quantize.rtn import group_range, rtn_grid, spread, storable_like, zero_point
from vlmexport.quantize.scheme import MAX_GROUP, QuantScheme
from vlmexport.quantize.statistics import InputStatistics

_SHARES = tuple(1 - step / 20 for step in range(1, 11))
_CHUNK_ELEMENTS = 1 << 19


def clipped_grid(weight: torch.Tensor, statistics: InputStatistics, scheme: QuantScheme, name: str = "weight") -> Grid:
    """The grid of ``weight [N, K]`` whose range, per row and group, is the share of the whole with the least error.

    Shares are 1, 0.95 … 0.5, of both ends alike or (asymmetric) of one end alone. The error of a group is the output
    error of its own columns rounded to nearest, ``e M e^T`` with M the group's block of the moment (its diagonal where
    a group is wider than 256 features).

    Raises `BadInputError` as `rtn_grid` does.
    """
    whole = rtn_grid(weight, scheme, name)
    low, high = group_range(weight, whole.group_size)
    scale, zero = whole.scale.clone(), whole.zero_point.clone()
    for group in range(scale.shape[1]):
        columns = slice(group * whole.group_size, (group + 1) * whole.group_size)
        metric = statistics.moment[columns, columns]
        for rows in _row_chunks(weight.shape[0], whole.group_size):
            part = weight[rows, columns].float()
            limits = low[rows, group], high[rows, group]
            scale[rows, group], zero[rows, group] = _search(part, scale[rows, group], limits, metric, scheme)
    return dataclasses.replace(whole, scale=scale, zero_point=zero)


def _row_chunks(rows: int, width: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _ends(scheme: QuantScheme) -> list[tuple[float, float]]:
    """Shares of the range below and above 0: both alike, and with zero points that can move, each alone."""
    alike = [(share, share) for share in _SHARES]
    return alike if scheme.symmetric else alike + [(s, 1.0) for s in _SHARES] + [(1.0, s) for s in _SHARES]


def _search(
    weight: torch.Tensor,
    whole: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor],
    metric: torch.Tensor,
    scheme: QuantScheme,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale and zero point ``[N]`` of one group, ``weight [N, g]``."""
    low, high = limits
    best_scale, best_zero = whole, zero_point(low, whole, scheme)
    best_loss = _loss(weight, best_scale, best_zero, metric, scheme.bits)
    for below, above in _ends(scheme):
        scale = storable_like(spread(low * below, high * above, scheme), whole, scheme.scale_bits)
        zero = zero_point(low * below, scale, scheme)
        loss = _loss(weight, scale, zero, metric, scheme.bits)
        better = loss < best_loss
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_loss = torch.where(better, loss, best_loss)
    return best_scale, best_zero


def _loss(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, metric: torch.Tensor, bits: int
) -> torch.Tensor:
    """Output error ``[N]`` of the group's columns alone."""
    value = nearest_codes(weight[:, None], scale[:, None], zero[:, None], bits)[:, 0]
    error = value.sub_(zero.float()[:, None]).mul_(scale.float()[:, None]).sub_(weight)
    if error.shape[1] > MAX_GROUP:
        return error.square_() @ metric.diagonal()
    return (error @ metric).mul_(error).sum(1)
