"""Round to nearest: the baseline quantizer, from the weights alone."""

from __future__ import annotations

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

_FP16 = torch.finfo(torch.float16)


def quantize_rtn(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """Quantize ``weight`` ``[N, K]`` (any float dtype, any device) by rounding each value to its nearest code.

    Symmetric: codes around ``2**(bits-1)``, scale the smallest that represents both extremes of the group
    (``max(w)/(2**(bits-1)-1)`` or ``-min(w)/2**(bits-1)``, whichever is larger; always positive). Asymmetric: the group's
    range including 0 spread over all codes. Scales are rounded to float16 *before* the codes are chosen.

    Raises `BadInputError` when K is not a multiple of the group size or the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    if columns % group_size:
        raise BadInputError(
            f"{name}: {columns} input features are not a multiple of group size {group_size}; "
            "choose a smaller --group-size or keep this layer with --keep"
        )
    if not torch.isfinite(weight).all():
        raise BadInputError(f"{name}: the weight holds NaN or infinity")
    groups = weight.float().reshape(rows, columns // group_size, group_size)
    scale, zero = _symmetric(groups, scheme.bits) if scheme.symmetric else _asymmetric(groups, scheme.bits)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = torch.round(groups / divisor.unsqueeze(-1)) + zero.unsqueeze(-1)
    codes = codes.clamp_(0, (1 << scheme.bits) - 1).to(torch.uint8).reshape(rows, columns)
    zero_point = None if scheme.symmetric else zero.to(torch.uint8)
    return QuantizedTensor(codes, scale, zero_point, scheme.bits, group_size)


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """The positive scales (float32) as float16, or unchanged where float16 overflows or is subnormal.

    Decided for the whole tensor, so that one matrix has one scale dtype.
    """
    nonzero = scale[scale != 0]
    fits = nonzero.numel() == 0 or bool((nonzero.max() <= _FP16.max) & (nonzero.min() >= _FP16.tiny))
    return scale.to(torch.float16) if fits else scale


def _symmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    middle = 1 << (bits - 1)
    scale = torch.maximum(groups.amax(-1) / (middle - 1), -groups.amin(-1) / middle).clamp_min_(0)
    scale = storable_scale(scale)
    return scale, torch.full_like(scale, middle, dtype=torch.float32)


def _asymmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = (1 << bits) - 1
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = storable_scale((high - low) / top)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return scale, torch.round(-low / divisor).clamp_(0, top)
