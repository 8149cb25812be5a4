"""`Grid`: the evenly spaced levels a weight is rounded to, fixed before any code is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

# Elements per step: the float32 working copies stay in a core's cache however large the matrix is.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Grid:
    """Levels ``(code - zero_point) * scale``, one pair per output row and group of input features.

    `scale`: float16 or float32 ``[N, K / group_size]`` exactly as it will be stored, 0 for a group of zeros;
    `zero_point`: uint8 of that shape (the middle when `symmetric`).
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool

    def nearest(self, weight: torch.Tensor) -> QuantizedTensor:
        """``weight [N, K]`` with every value rounded to its nearest level (ties to the even multiple of the scale)."""
        groups = weight.reshape(*self.scale.shape, self.group_size)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
        for chunk in row_chunks(weight):
            codes[chunk] = nearest_codes(groups[chunk].float(), self.scale[chunk], self.zero_point[chunk], self.bits)
        return self.quantized(codes.reshape(weight.shape))

    def quantized(self, codes: torch.Tensor) -> QuantizedTensor:
        """The tensor of uint8 ``codes [N, K]`` on this grid."""
        return QuantizedTensor(
            codes, self.scale, None if self.symmetric else self.zero_point, self.bits, self.group_size
        )


def nearest_codes(groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, as float32, of float32 ``groups [N, K/g, g]`` for ``scale`` and ``zero_point`` ``[N, K/g]``."""
    codes = (groups / positive(scale.float()).unsqueeze(-1)).round_()
    return codes.add_(zero_point.float().unsqueeze(-1)).clamp_(0, (1 << bits) - 1)


def positive(scale: torch.Tensor) -> torch.Tensor:
    """`scale` with 1 in place of 0, to divide by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def group_size_of(weight: torch.Tensor, scheme: QuantScheme, name: str) -> int:
    """The scheme's group size in input features; `BadInputError` when it does not divide those of ``weight [N, K]``."""
    columns = weight.shape[1]
    group_size = columns if scheme.group_size == PER_CHANNEL else scheme.group_size
    if columns % group_size:
        raise BadInputError(
            f"{name}: {columns} input features are not a multiple of group size {group_size}; "
            "choose a smaller --group-size or keep this layer with --keep"
        )
    return group_size


def row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of ``weight [N, K]`` that are small enough to work on in a core's cache."""
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
