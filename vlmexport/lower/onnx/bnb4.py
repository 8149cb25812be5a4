"""NF4 weights as ``com.microsoft.MatMulBnb4``: bitsandbytes' bytes and absmax, unchanged."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.weights import initializer
from vlmexport.quantize.nf4 import NF4_LEVELS
from vlmexport.quantize.tensor import QuantizedTensor

_NF4 = 1  # the operator's quant_type; 0 is FP4


def bnb4_initializers(name: str, rows: int, columns: int, block: int) -> tuple[ir.Value, ir.Value]:
    """The operator's codes, uint8 ``[rows * columns / 2]``, and absmax, float32 ``[rows * columns / block]``.

    absmax is stored in float32 whatever the product computes in, so that the file holds what the quantizer chose.
    """
    count = rows * columns
    return (
        initializer(f"{name}.codes", ir.DataType.UINT8, (count // 2,)),
        initializer(f"{name}.scale", ir.DataType.FLOAT, (count // block,)),
    )


def bnb4_product(
    tape: Tape, x: ir.Value, codes: ir.Value, absmax: ir.Value, shape: tuple[int, int], block: int
) -> ir.Value:
    """``x [..., K]`` times the transposed weight of `shape` ``[N, K]``; `absmax` has `x`'s type."""
    attributes = {"K": shape[1], "N": shape[0], "block_size": block, "quant_type": _NF4}
    return tape.op("MatMulBnb4", [x, codes, absmax], attributes, domain="com.microsoft")


def pack_bnb4(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes two to a byte along the row-major matrix, the first in the high bits, and absmax float32, both flat.

    Raises ValueError when the levels are not NF4's: the operator knows no others.
    """
    if tensor.codebook is None or not torch.equal(tensor.codebook.cpu(), torch.tensor(NF4_LEVELS)):
        raise ValueError("MatMulBnb4 holds NF4 codes only")
    pairs = tensor.codes.reshape(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).numpy(), tensor.scale.float().reshape(-1).numpy()
