"""Round to nearest: the baseline quantizer, from the weights alone."""

from __future__ import annotations

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

_FP16 = torch.finfo(torch.float16)
# Elements per step: the float32 working copies stay in a core's cache however large the matrix is.
_CHUNK_ELEMENTS = 1 << 18


def quantize_rtn(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """Quantize ``weight`` ``[N, K]`` (any float dtype, any device) by rounding each value to its nearest code.

    Symmetric: codes around ``2**(bits-1)``, scale the smallest that represents both extremes of the group
    (``max(w)/(2**(bits-1)-1)`` or ``-min(w)/2**(bits-1)``, whichever is larger; always positive). Asymmetric: the
    group's range including 0 spread over all codes. Scales are rounded to float16 *before* the codes are chosen.

    Raises `BadInputError` when K is not a multiple of the group size or the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    if columns % group_size:
        raise BadInputError(
            f"{name}: {columns} input features are not a multiple of group size {group_size}; "
            "choose a smaller --group-size or keep this layer with --keep"
        )
    groups = weight.reshape(rows, columns // group_size, group_size)
    step = max(1, _CHUNK_ELEMENTS // columns)
    chunks = [slice(start, start + step) for start in range(0, rows, step)]
    scale = storable_scale(torch.cat([_scale(groups[chunk].float(), scheme, name) for chunk in chunks]))
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    zero_point = torch.empty(scale.shape, dtype=torch.uint8, device=weight.device)
    for chunk in chunks:
        codes[chunk], zero_point[chunk] = _round(groups[chunk].float(), scale[chunk].float(), scheme)
    codes = codes.reshape(rows, columns)
    return QuantizedTensor(codes, scale, None if scheme.symmetric else zero_point, scheme.bits, group_size)


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """The positive scales (float32) as float16, or unchanged where float16 overflows or is subnormal.

    Decided for the whole tensor, so that one matrix has one scale dtype.
    """
    nonzero = scale[scale != 0]
    fits = nonzero.numel() == 0 or bool((nonzero.max() <= _FP16.max) & (nonzero.min() >= _FP16.tiny))
    return scale.to(torch.float16) if fits else scale


def _scale(groups: torch.Tensor, scheme: QuantScheme, name: str) -> torch.Tensor:
    """Float32 scales ``[N, K/g]`` of groups ``[N, K/g, g]``."""
    low, high = torch.aminmax(groups, dim=-1)
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    if not torch.isfinite(high - low).all():
        raise BadInputError(f"{name}: the weight holds NaN or infinity")
    if scheme.symmetric:
        middle = 1 << (scheme.bits - 1)
        return torch.maximum(high / (middle - 1), -low / middle)
    return (high - low) / ((1 << scheme.bits) - 1)


def _round(groups: torch.Tensor, scale: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[N, K/g, g]`` uint8 and zero points ``[N, K/g]`` for the (stored) scales."""
    top = (1 << scheme.bits) - 1
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    if scheme.symmetric:
        zero = torch.full_like(scale, 1 << (scheme.bits - 1))
    else:
        zero = torch.round(-groups.amin(-1).clamp_max_(0) / divisor).clamp_(0, top)
    codes = (groups / divisor.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, top)
    return codes.to(torch.uint8), zero
