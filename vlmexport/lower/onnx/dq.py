"""Quantized linear layers in standard operators: ``DequantizeLinear`` in front of ``MatMul`` (docs/manifest.md).

What TensorRT for RTX 1.7.1 takes, and keeps in few bits in the engine, was measured: INT4 in any blocks that divide K,
INT8 in blocks or with one scale per output channel; no zero points; INT8 scales above zero.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.errors import BadInputError
from vlmexport.lower.onnx.linear import LinearEmitter, LinearRef, cast, check_scale, dtype_of
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.quantize.blocks import block_size
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor, stack_rows

CODES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
_FP16_MAX = 65504.0


class DequantizeEmitter(LinearEmitter):
    """Emits the plan's quantized linears as ``DequantizeLinear`` and ``MatMul``, all others as `LinearEmitter` does.

    Scales are stored in float16. A product that is wider than that is made with its weight dequantized to float32.
    """

    def _quantized(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        scheme = self._planned(members[0]).scheme
        if scheme is None:
            raise ValueError(f"{name}: planned to be quantized without a scheme")
        _check_scheme(scheme, members[0].weight)
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        whole = scheme.bits == 8 and scheme.group_size == PER_CHANNEL
        block = columns if whole else block_size(columns, scheme.group_size)
        codes = initializer(f"{name}.codes", CODES[scheme.bits], (columns, rows))
        scale = initializer(f"{name}.scale", ir.DataType.FLOAT16, (rows,) if whole else (columns // block, rows))
        self.groups.append(WeightGroup((codes, scale), lambda: self._make_dequantized(members, name, block, whole)))
        weight = tape.op(
            "DequantizeLinear",
            [codes, cast(tape, scale, dtype_of(x))],
            {"axis": 1} if whole else {"axis": 0, "block_size": block},
        )
        out = tape.op("MatMul", [x, weight])
        bias = self._bias(members, name, dtype_of(x))
        return out if bias is None else tape.op("Add", [out, bias])

    def _make_dequantized(
        self, members: tuple[LinearRef, ...], name: str, block: int, whole: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        tensors = [self._quantize(m, block, ir.DataType.FLOAT16) for m in members]
        for member, tensor in zip(members, tensors, strict=True):
            _check_tensor(tensor, member.weight)
        codes, scale = pack_dequantize(stack_rows(tensors))
        self._record(members, tensors, name, block)
        return codes, scale.reshape(-1) if whole else scale


def pack_dequantize(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``[K, N]`` (int4 or int8, the logical code less its middle) and scale float16 ``[K / g, N]``.

    Raises ValueError for a tensor with zero points or a codebook, and for other widths than 4 and 8 bits.
    """
    if tensor.bits not in CODES or tensor.zero_point is not None or tensor.codebook is not None:
        raise ValueError("DequantizeLinear holds 4 or 8 bits without zero points or codebook")
    signed = (tensor.codes - (1 << (tensor.bits - 1))).view(torch.int8)  # uint8 wraps to what int8 reads as negative
    codes = signed.t().contiguous().numpy().astype(CODES[tensor.bits].numpy(), copy=False)
    return codes, tensor.scale.to(torch.float16).t().contiguous().numpy()


def _check_scheme(scheme: QuantScheme, name: str) -> None:
    """Refuse what the operator cannot say; the plan refuses it too, unless a checkpoint's own codes came that way."""
    if scheme.bits not in CODES:
        raise BadInputError(f"{name}: DequantizeLinear holds 4 or 8 bits, not {scheme.bits}")
    if algorithm(scheme.algorithm).codebook:
        raise BadInputError(f"{name}: {scheme.algorithm} codes stand for levels of a table, which TensorRT cannot read")
    if not scheme.symmetric:
        raise BadInputError(f"{name}: its codes have zero points, which TensorRT refuses; choose --symmetric")


def _check_tensor(tensor: QuantizedTensor, name: str) -> None:
    """Refuse scales that float16 or TensorRT's parser does not take; `tensor` has its scales as they are stored."""
    if tensor.zero_point is not None or tensor.codebook is not None:
        raise BadInputError(f"{name}: its codes have zero points or a codebook; TensorRT takes neither")
    check_scale(tensor.scale.numpy(), ir.DataType.FLOAT16, name)
    largest = float(tensor.scale.float().abs().max()) * (1 << (tensor.bits - 1))
    if largest > _FP16_MAX:
        raise BadInputError(f"{name}: codes stand for values up to {largest:.3g}, above FP16's {_FP16_MAX:.0f}")
    smallest = float(tensor.scale.float().min())
    if tensor.bits == 8 and smallest <= 0:
        raise BadInputError(
            f"{name}: a scale is {smallest:.3g} in float16, and TensorRT takes INT8 weights with scales above 0 only; "
            "keep this layer with --keep"
        )
