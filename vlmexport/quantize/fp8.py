"""FP8 E4M3 weights (OCP 8-bit floating point specification 1.0), one scale per output row."""

from __future__ import annotations

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

LARGEST = 448.0
_CHUNK_ELEMENTS = 1 << 18


def quantize_fp8(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """FP8 codes of ``weight [N, K]`` (any float dtype, any device): the bits of torch's ``float8_e4m3fn`` as uint8.

    The scale, float32 ``[N, 1]``, takes the row's largest magnitude to 448; float32's epsilon for a row of zeros, as in
    compressed-tensors. `scheme` has nothing to say: 8 bits, one group per row. Codes of NaN (0x7F and 0xFF) are never
    made. Raises `BadInputError` when the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    scale = weight.abs().amax(dim=1, keepdim=True).float() / LARGEST
    if not torch.isfinite(scale).all():
        raise BadInputError(f"{name}: the weight holds NaN or infinity")
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        unit = (weight[chunk].float() / scale[chunk]).clamp(-LARGEST, LARGEST)
        codes[chunk] = unit.to(torch.float8_e4m3fn).view(torch.uint8)
    codebook = e4m3_codebook().to(weight.device)
    return QuantizedTensor(codes, scale, None, scheme.bits, columns, codebook=codebook)


def e4m3_codebook() -> torch.Tensor:
    """The value of every byte as E4M3, float32 ``[256]``: sign, 4 bits of exponent (bias 7), 3 of fraction.

    0x7F and 0xFF are NaN; there is no infinity.
    """
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
