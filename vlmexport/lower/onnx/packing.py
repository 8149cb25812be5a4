"""Pack logical codes into the layouts of ONNX Runtime's operators (MatMulNBits: low bits first, K in blocks)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vlmexport.quantize.blocks import block_size
from vlmexport.quantize.tensor import QuantizedTensor


@dataclass(frozen=True)
class MatMulNBitsArrays:
    """The operator's initializers: codes uint8 ``[N, K/g, g*bits/8]``, scale ``[N, K/g]``, zero points or None."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    block_size: int


def pack_matmul_nbits(tensor: QuantizedTensor, scale_dtype: type[np.generic]) -> MatMulNBitsArrays:
    """Pack `tensor`; scales become `scale_dtype` (the operator wants its activations' type)."""
    rows, columns = tensor.shape
    block = block_size(columns, tensor.group_size)
    repeat = tensor.group_size // block
    scale = tensor.scale.repeat_interleave(repeat, dim=1).numpy().astype(scale_dtype)
    codes = pack_bits(tensor.codes.reshape(rows, columns // block, block), tensor.bits)
    zero = None
    if tensor.zero_point is not None:
        zero = pack_bits(tensor.zero_point.repeat_interleave(repeat, dim=1), tensor.bits).numpy()
    return MatMulNBitsArrays(codes.numpy(), scale, zero, block)


def pack_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 `values` of `bits` (2, 4 or 8) along the last axis, first value in the lowest bits, zero-padded."""
    per_byte = 8 // bits
    if per_byte == 1:
        return values.contiguous()
    missing = -values.shape[-1] % per_byte
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    lanes = padded.reshape(*padded.shape[:-1], -1, per_byte)
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed
