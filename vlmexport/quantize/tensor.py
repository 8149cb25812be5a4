"""`QuantizedTensor`: logical integers with their scales. Packing belongs to the emitters."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmexport.errors import BadInputError


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight of shape ``[out_features N, in_features K]``, unpacked.

    `codes`: uint8 ``[N, K]``, each in ``0 .. 2**bits - 1``. `scale`: float16 or float32 ``[N, ceil(K / group_size)]``
    (float32 only where float16 would overflow or lose precision to subnormals). `zero_point`: uint8 of the scale's
    shape, or None for the symmetric middle ``2**(bits-1)``. Groups run along the input features (`axis` 1).
    `codebook`: float32 ``[2**bits]`` for formats whose levels are not evenly spaced (NF4, FP8), else None.
    The meaning is ``(codes - zero_point) * scale``, or ``codebook[codes] * scale``, and nothing else: see `dequantize`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int
    axis: int = 1
    codebook: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[N, K]`` that the codes stand for."""
        if self.codebook is not None:
            wide = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]
            return self.codebook[self.codes.long()] * wide
        middle = 1 << (self.bits - 1)
        zero = torch.full_like(self.scale, middle) if self.zero_point is None else self.zero_point
        columns = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        zero = zero.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        return (self.codes.float() - zero) * scale

    def regrouped(self, group_size: int) -> QuantizedTensor:
        """The same weight in smaller groups: every scale and zero point repeated.

        Raises `BadInputError` when `group_size` does not divide the present one.
        """
        if self.group_size % group_size:
            raise BadInputError(f"groups of {self.group_size} cannot be cut into groups of {group_size}")
        times = self.group_size // group_size
        zero = None if self.zero_point is None else self.zero_point.repeat_interleave(times, dim=1)
        return dataclasses.replace(
            self, scale=self.scale.repeat_interleave(times, dim=1), zero_point=zero, group_size=group_size
        )

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Output rows ``start`` to ``stop``."""
        zero = None if self.zero_point is None else self.zero_point[start:stop]
        return dataclasses.replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero_point=zero)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        """The same weight with its output rows in another order; `move` gets codes, scales and zero points in turn."""
        zero = None if self.zero_point is None else move(self.zero_point)
        return dataclasses.replace(self, codes=move(self.codes), scale=move(self.scale), zero_point=zero)

    def digest(self) -> str:
        """SHA-256 of the logical content (bits, shape, group size, codes, scales as float32, zero points, codebook)."""
        head = f"{self.bits}|{self.shape[0]}|{self.shape[1]}|{self.group_size}|"
        digest = hashlib.sha256(head.encode())
        digest.update(self.codes.contiguous().cpu().numpy().tobytes())
        digest.update(self.scale.float().contiguous().cpu().numpy().tobytes())
        if self.zero_point is not None:
            digest.update(self.zero_point.contiguous().cpu().numpy().tobytes())
        if self.codebook is not None:
            digest.update(self.codebook.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def stack_rows(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack matrices that share bits, group size, input width, symmetry and codebook along the output rows.

    Raises `BadInputError` when they differ in any of those.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    for other in tensors[1:]:
        same = (other.bits, other.group_size, other.shape[1]) == (first.bits, first.group_size, first.shape[1])
        if not same or (other.zero_point is None) != (first.zero_point is None) or not _same_codebook(first, other):
            raise BadInputError("cannot stack quantized tensors of different bits, group size, width or symmetry")
    scale_dtype = torch.float32 if any(t.scale.dtype == torch.float32 for t in tensors) else torch.float16
    zero_points = [t.zero_point for t in tensors if t.zero_point is not None]
    return QuantizedTensor(
        codes=torch.cat([t.codes for t in tensors]),
        scale=torch.cat([t.scale.to(scale_dtype) for t in tensors]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        bits=first.bits,
        group_size=first.group_size,
        codebook=first.codebook,
    )


def _same_codebook(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    if one.codebook is None or other.codebook is None:
        return one.codebook is other.codebook
    return torch.equal(one.codebook.nan_to_num(), other.codebook.nan_to_num())
