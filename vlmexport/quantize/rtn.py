"""Round to nearest: the baseline quantizer, from the weights alone."""

from __future__ import annotations

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.grid import Grid, group_size_of, positive, row_chunks
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

_FP16 = torch.finfo(torch.float16)
_SUBNORMAL_EXPONENT = -24  # of the smallest float16, and of the step between the smallest ones


def quantize_rtn(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """Quantize ``weight`` ``[N, K]`` (any float dtype, any device) by rounding each value to its nearest code.

    Raises `BadInputError` when K is not a multiple of the group size or the weight holds NaN or infinity.
    """
    return rtn_grid(weight, scheme, name).nearest(weight)


def rtn_grid(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> Grid:
    """The grid that covers the whole range of every group of ``weight [N, K]``.

    Symmetric: codes around ``2**(bits-1)``, scale the smallest that represents both extremes of the group
    (``max(w)/(2**(bits-1)-1)`` or ``-min(w)/2**(bits-1)``, whichever is larger; always positive). Asymmetric: the
    group's range including 0 spread over all codes. Scales are rounded to float16 *before* anything is rounded to them.

    Raises `BadInputError` when K is not a multiple of the group size, when the weight holds NaN or infinity, and when
    the scheme's scale bits cannot hold a scale.
    """
    group_size = group_size_of(weight, scheme, name)
    low, high = group_range(weight, group_size)
    if not torch.isfinite(high - low).all():
        raise BadInputError(f"{name}: the weight holds NaN or infinity")
    wide = spread(low, high, scheme)
    scale = limited_scale(wide, scheme.scale_bits) if scheme.scale_bits else storable_scale(wide)
    if not torch.isfinite(scale).all():
        raise BadInputError(f"{name}: a scale of {float(wide.max()):.3g} is above what float16 holds ({_FP16.max:.0f})")
    return Grid(scale, zero_point(low, scale, scheme), scheme.bits, group_size, scheme.symmetric)


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """The positive scales (float32) as float16, or unchanged where float16 overflows or is subnormal.

    Decided for the whole tensor, so that one matrix has one scale dtype.
    """
    nonzero = scale[scale != 0]
    fits = nonzero.numel() == 0 or bool((nonzero.max() <= _FP16.max) & (nonzero.min() >= _FP16.tiny))
    return scale.to(torch.float16) if fits else scale


def limited_scale(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The positive scales (float32) as float16 of at most `bits` significant bits; infinite where that overflows.

    Below the normal range the step between scales stays that of the smallest float16, and a scale may become 0.
    """
    exponent = torch.frexp(scale).exponent - bits
    step = torch.exp2(exponent.clamp_min(_SUBNORMAL_EXPONENT).float())
    return (scale / step).round_().mul_(step).to(torch.float16)


def storable_like(scale: torch.Tensor, whole: torch.Tensor, bits: int = 0) -> torch.Tensor:
    """Float32 `scale` in `whole`'s dtype; `whole`, the scales of the whole range, where that dtype cannot hold it.

    `bits` are a scheme's scale bits.
    """
    if bits:
        stored = limited_scale(scale, bits)
        return torch.where(torch.isfinite(stored) & (stored > 0), stored, whole)
    stored = scale.to(whole.dtype)
    fits = torch.isfinite(stored) & (stored >= torch.finfo(whole.dtype).tiny)
    return torch.where(fits, stored, whole)


def group_range(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each group, widened to hold 0: float32 ``[N, K / group_size]`` each."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    ranges = [torch.aminmax(groups[chunk].float(), dim=-1) for chunk in row_chunks(weight)]
    return torch.cat([r.min for r in ranges]).clamp_max_(0), torch.cat([r.max for r in ranges]).clamp_min_(0)


def spread(low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The step between levels, in `low`'s dtype and shape, that makes `scheme`'s codes cover ``low .. high``."""
    if scheme.symmetric:
        middle = 1 << (scheme.bits - 1)
        return torch.maximum(high / (middle - 1), -low / middle)
    return (high - low) / ((1 << scheme.bits) - 1)


def zero_point(low: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The uint8 code that stands for 0, of `low`'s shape, on the (stored) scales."""
    if scheme.symmetric:
        return torch.full(low.shape, 1 << (scheme.bits - 1), dtype=torch.uint8, device=low.device)
    return torch.round(-low / positive(scale.float())).clamp_(0, (1 << scheme.bits) - 1).to(torch.uint8)
