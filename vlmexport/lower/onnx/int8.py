"""INT8 products for prompts: weights int8 per output channel, activations rounded to 8 bits with one scale per row.

A row ``x [K]`` becomes ``q = round(x * 127 / peak) + 128`` (uint8, half to even, ``peak = max |x|``), the product is
``(q - 128) @ codes`` in 32-bit integers, times the weight's scale of each column, times ``peak / 127``. ONNX Runtime's
``DynamicQuantizeMatMul`` has one scale for the whole tensor, which one row with large values spoils for all others; a
constant zero point is all that ``MatMulIntegerToFloat`` takes, so the rows' ranges are symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.linear import MICROSOFT, LinearEmitter, LinearRef
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.quantize.tensor import QuantizedTensor, stack_rows

PREFIX = "prefill."
LEVELS = 127
MIDDLE = 128
# Keeps a row of zeros from dividing by zero; far below any activation.
TINY = 1e-30


@dataclass(frozen=True)
class RoundedRows:
    """An activation as uint8 ``[..., K]`` and the step ``[..., 1]`` that one code of each row stands for."""

    codes: ir.Value
    step: ir.Value


@dataclass
class Int8Emitter(LinearEmitter):
    """Emits the prompt's linears: those in `int8` as INT8 products, all others as its plan says.

    Matrices that only the prompt graph has are named with `PREFIX`; `shared` ones keep the decode graph's name, so
    both graphs can read it from one file. An activation is rounded once, however many linears read it.
    """

    int8: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    rounded: dict[ir.Value, RoundedRows] = field(default_factory=dict)
    numbers: dict[str, ir.Value] = field(default_factory=dict)

    def emit(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        """See `LinearEmitter.emit`."""
        if any(m.weight in self.shared for m in members):
            return super().emit(tape, x, members, name)
        name = PREFIX + name
        if not all(m.weight in self.int8 for m in members):
            return super().emit(tape, x, members, name)
        return self._int8(tape, x, members, name)

    def uniform(self, members: tuple[LinearRef, ...]) -> bool:
        """See `LinearEmitter.uniform`; INT8 products and others do not mix."""
        kinds = {(m.weight in self.int8, m.weight in self.shared) for m in members}
        return len(kinds) == 1 and super().uniform(members)

    def _int8(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        codes = initializer(f"{name}.codes", ir.DataType.INT8, (columns, rows))
        scale = initializer(f"{name}.scale", ir.DataType.FLOAT, (rows,))
        self.groups.append(WeightGroup((codes, scale), lambda: self._make_int8(members, name)))
        given = self._rounded(tape, x)
        one, middle = self._number(tape, "one", 1.0), self._middle(tape)
        product = tape.op("MatMulIntegerToFloat", [given.codes, codes, one, scale, middle], domain=MICROSOFT)
        out = tape.op("Mul", [product, given.step])
        bias = self._bias(members, name, ir.DataType.FLOAT)
        out = out if bias is None else tape.op("Add", [out, bias])
        out.type = ir.TensorType(ir.DataType.FLOAT)
        return out

    def _rounded(self, tape: Tape, x: ir.Value) -> RoundedRows:
        if x not in self.rounded:
            axis = self._shared_value(tape, "axis", ir.tensor([-1], dtype=ir.DataType.INT64))
            high = tape.op("ReduceMax", [x, axis], {"keepdims": 1})
            low = tape.op("ReduceMin", [x, axis], {"keepdims": 1})
            peak = tape.op("Max", [high, tape.op("Neg", [low]), self._number(tape, "tiny", TINY)])
            levels = self._number(tape, "levels", LEVELS)
            unit = tape.op("Mul", [x, tape.op("Div", [levels, peak])])
            codes = tape.op("QuantizeLinear", [unit, self._number(tape, "one", 1.0), self._middle(tape)])
            self.rounded[x] = RoundedRows(codes, tape.op("Div", [peak, levels]))
        return self.rounded[x]

    def _number(self, tape: Tape, name: str, value: float) -> ir.Value:
        return self._shared_value(tape, name, ir.tensor(value, dtype=ir.DataType.FLOAT))

    def _middle(self, tape: Tape) -> ir.Value:
        return self._shared_value(tape, "middle", ir.tensor(MIDDLE, dtype=ir.DataType.UINT8))

    def _shared_value(self, tape: Tape, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self.numbers:
            tensor.name = f"{PREFIX}{name}"
            self.numbers[name] = tape.initializer(tensor)
        return self.numbers[name]

    def _make_int8(self, members: tuple[LinearRef, ...], name: str) -> tuple[np.ndarray, ...]:
        tensors = [self.weights.quantized(m.weight) for m in members]
        stacked = stack_rows(tensors)
        self._record(members, tensors, name, stacked.group_size)
        return pack_int8(stacked)


def pack_int8(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 ``[K, N]`` and scale float32 ``[N]`` of an 8-bit symmetric weight with one group per output row.

    Raises ValueError for any other tensor.
    """
    if tensor.bits != 8 or tensor.zero_point is not None or tensor.group_size != tensor.shape[1]:
        raise ValueError("an INT8 product needs 8 bits, no zero points and one scale per output row")
    codes = (tensor.codes.to(torch.int16) - MIDDLE).to(torch.int8)
    return np.ascontiguousarray(codes.t().numpy()), tensor.scale.reshape(-1).float().numpy()
