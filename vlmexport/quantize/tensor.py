"""`QuantizedTensor`: logical integers with their scales. Packing belongs to the emitters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from vlmexport.errors import BadInputError


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight of shape ``[out_features N, in_features K]``, unpacked.

    `codes`: uint8 ``[N, K]``, each in ``0 .. 2**bits - 1``. `scale`: float16 or float32 ``[N, ceil(K / group_size)]``
    (float32 only where float16 would overflow or lose precision to subnormals). `zero_point`: uint8 of the scale's
    shape, or None for the symmetric middle ``2**(bits-1)``. Groups run along the input features (`axis` 1).
    The meaning is ``(codes - zero_point) * scale`` and nothing else: see `dequantize`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int
    axis: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[N, K]`` that the codes stand for."""
        middle = 1 << (self.bits - 1)
        zero = torch.full_like(self.scale, middle) if self.zero_point is None else self.zero_point
        columns = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        zero = zero.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        return (self.codes.float() - zero) * scale

    def digest(self) -> str:
        """SHA-256 of the logical content (bits, shape, group size, codes, scales as float32, zero points)."""
        head = f"{self.bits}|{self.shape[0]}|{self.shape[1]}|{self.group_size}|"
        digest = hashlib.sha256(head.encode())
        digest.update(self.codes.contiguous().numpy().tobytes())
        digest.update(self.scale.float().contiguous().numpy().tobytes())
        if self.zero_point is not None:
            digest.update(self.zero_point.contiguous().numpy().tobytes())
        return digest.hexdigest()


def stack_rows(tensors: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack matrices that share bits, group size, input width and symmetry along the output rows.

    Raises `BadInputError` when they differ in any of those.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    for other in tensors[1:]:
        same = (other.bits, other.group_size, other.shape[1]) == (first.bits, first.group_size, first.shape[1])
        if not same or (other.zero_point is None) != (first.zero_point is None):
            raise BadInputError("cannot stack quantized tensors of different bits, group size, width or symmetry")
    scale_dtype = torch.float32 if any(t.scale.dtype == torch.float32 for t in tensors) else torch.float16
    zero_points = [t.zero_point for t in tensors if t.zero_point is not None]
    return QuantizedTensor(
        codes=torch.cat([t.codes for t in tensors]),
        scale=torch.cat([t.scale.to(scale_dtype) for t in tensors]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        bits=first.bits,
        group_size=first.group_size,
    )
