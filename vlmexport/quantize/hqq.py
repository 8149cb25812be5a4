"""Half-quadratic quantization: scales and zero points that leave sparse errors, from the weights alone.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023): the p-norm of
the error, p < 1, is made smaller by turns over its sparse part (a shrinkage) and the grid (a closed form). The authors'
zero points are fractions; ours are codes, so that integer formats can hold them, and the scale moves as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from vlmexport.quantize.grid import nearest_codes, positive, row_chunks
from vlmexport.quantize.rtn import rtn_grid, storable_like
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

_POWER = 0.7
_STEPS = 20
# The quadratic term's weight, per squared step, and its growth per turn (the authors' values).
_BETA, _GROWTH = 10.0, 1.01


def quantize_hqq(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """Quantize ``weight [N, K]`` (any float dtype, any device) with the scales and zero points of the search.

    No group's error, as ``sum |w - value|^0.7``, is above that of `quantize_rtn`. Zero points are uint8, asymmetric.

    Raises `BadInputError` when K is not a multiple of the group size or the weight holds NaN or infinity.
    """
    whole = rtn_grid(weight, scheme, name)
    groups = weight.reshape(*whole.scale.shape, whole.group_size)
    scale, zero = whole.scale.clone(), whole.zero_point.clone()
    for rows in row_chunks(weight):
        scale[rows], zero[rows] = _search(groups[rows].float(), scale[rows], zero[rows], scheme)
    return dataclasses.replace(whole, scale=scale, zero_point=zero).nearest(weight)


def _search(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: QuantScheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of all grids that the turns visit: ``[N, K/g]`` for float32 ``groups [N, K/g, g]``."""
    best_scale, best_zero = scale, zero
    best_loss = torch.full(scale.shape, float("inf"), device=scale.device)
    for offset in (0, -1, 1):
        start = (zero.int() + offset).clamp_(0, (1 << scheme.bits) - 1).to(torch.uint8)
        for visited_scale, visited_zero, loss in _turns(groups, scale, start, scheme):
            better = loss < best_loss
            best_scale = torch.where(better, visited_scale, best_scale)
            best_zero = torch.where(better, visited_zero, best_zero)
            best_loss = torch.where(better, loss, best_loss)
    return best_scale, best_zero


def _turns(
    groups: torch.Tensor, whole: torch.Tensor, zero: torch.Tensor, scheme: QuantScheme
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Grids (scale, zero point) of ever smaller error, and that error, from the whole range's scale on."""
    scale, beta = whole, _BETA
    for _ in range(_STEPS):
        step = positive(scale.float()).unsqueeze(-1)
        levels = nearest_codes(groups, scale, zero, scheme.bits).sub_(zero.float().unsqueeze(-1))
        error = torch.addcmul(groups, levels, step, value=-1).div_(step)
        yield scale, zero, (error * step).abs_().pow_(_POWER).sum(-1)
        size = error.abs()
        sparse = error.sign_().mul_((size - size.clamp_min(1e-6).pow(_POWER - 1) / beta).clamp_min_(0))
        wanted = torch.addcmul(groups, sparse, step, value=-1)
        square = levels.square().sum(-1)
        fitted = (levels * wanted).sum(-1) / positive(square)
        scale = torch.where(square > 0, storable_like(fitted, whole, scheme.scale_bits), whole)
        beta *= _GROWTH
