"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314), with the codes that bitsandbytes' CPU code chooses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

# QLoRA, appendix E: quantiles of a normal distribution, 0 among them.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Scales of nested NF4 are quantized again in blocks of this many, across rows.
NESTED_BLOCK = 256
# Below this a block counts as zeros: its reciprocal would overflow float32.
_SMALLEST = 1e-38
# Elements per step: the float32 working copies stay in a core's cache however large the matrix is.
_CHUNK_ELEMENTS = 1 << 18
# bitsandbytes' CPU code finds the nearest 8-bit level from a table of this many evenly spaced values in -1 .. 1.
_GRID = 65535


@dataclass(frozen=True)
class NestedAbsmax:
    """Scales of NF4 groups, quantized to 8 bits: ``codebook[codes] * absmax of the block + offset``.

    `codes`: uint8 of the scales' shape; `absmax`: float32 ``[ceil(scales / 256)]``, one per 256 scales in row-major
    order; `offset`: float32 scalar, the mean of the scales; `codebook`: float32 ``[256]``, ascending. bitsandbytes
    stores them as ``absmax``, ``nested_absmax``, ``nested_offset`` (in its JSON state) and ``nested_quant_map``.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor
    codebook: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The float32 scales that the codes stand for, of the codes' shape."""
        flat = self.codebook[self.codes.reshape(-1).long()]
        wide = self.absmax.repeat_interleave(NESTED_BLOCK)[: flat.numel()]
        return (flat * wide + self.offset).reshape(self.codes.shape)


def quantize_nf4(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """NF4 codes of ``weight [N, K]`` (any float dtype, any device), the ones of bitsandbytes' ``quantize_4bit``.

    The scale is the group's largest magnitude, float32; a value halfway between two levels gets the lower one.
    Raises `BadInputError` when K is not a multiple of the group size or the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    group_size = scheme.group_size
    if columns % group_size:
        raise BadInputError(
            f"{name}: {columns} input features are not a multiple of NF4's group size {group_size}; "
            "choose a --group-size of 64, 128 or 256 that divides, or keep this layer with --keep"
        )
    groups = weight.reshape(rows, columns // group_size, group_size)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(groups.shape[:2], device=weight.device)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        codes[chunk], absmax[chunk] = _nearest_levels(groups[chunk].float(), levels)
    if not torch.isfinite(absmax).all():
        raise BadInputError(f"{name}: the weight holds NaN or infinity")
    return QuantizedTensor(codes.reshape(rows, columns), absmax, None, 4, group_size, codebook=levels)


def quantize_nf4_nested(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """`quantize_nf4` with the scales of `nest_absmax`: bitsandbytes' ``compress_statistics`` (double quantization)."""
    plain = quantize_nf4(weight, scheme, name)
    return dataclasses.replace(plain, scale=nest_absmax(plain.scale).dequantize())


def nest_absmax(absmax: torch.Tensor) -> NestedAbsmax:
    """Quantize the scales of one whole weight, float32 of any shape, to 8 bits as bitsandbytes' CPU code does.

    `absmax` are `quantize_nf4`'s scales: the rounded ones cannot be nested again, since their mean is another. The mean
    is torch's own, whose last bit may depend on the number of threads for more than 32768 scales.
    """
    offset = absmax.mean()
    flat = (absmax - offset).reshape(-1)
    count = flat.numel()
    blocks = torch.nn.functional.pad(flat, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1)
    codebook = dynamic_codebook().to(absmax.device)
    unit = (blocks * (1.0 / largest.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1)
    codes = _nearest_on_grid(unit, codebook)
    codes[largest == 0] = 0  # as bitsandbytes leaves a block without extent
    return NestedAbsmax(codes.reshape(-1)[:count].reshape(absmax.shape), largest, offset, codebook)


def dynamic_codebook() -> torch.Tensor:
    """The signed 8-bit dynamic data type (arXiv 1511.04561), float32 ``[256]``, ascending.

    For each of seven decades, the upper with more bits for the fraction: the middles of ``2**i`` equal parts of 0.1 to
    1, both signs; and 0 and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(levels))


def _nearest_levels(groups: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of groups ``[N, K/g, g]`` (float32) and their largest magnitudes ``[N, K/g]``."""
    absmax = groups.abs().amax(dim=-1)
    # Times the reciprocal, as bitsandbytes does: a quotient differs in the last bit, and so do codes near a boundary.
    unit = (groups * (1.0 / absmax.clamp(min=_SMALLEST))[..., None]).clamp(-1, 1)
    return torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8), absmax


def _nearest_on_grid(unit: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to the grid point of each value in -1 .. 1, the lower of two: uint8."""
    point = ((unit + 1.0) * 0.5 * float(_GRID) + 0.5).to(torch.int32)
    middles = (codebook[:-1].double() + codebook[1:].double()) / 2
    return torch.bucketize(point.double() / _GRID * 2 - 1, middles, out_int32=True).to(torch.uint8)
