"""Linear layers: one matrix product node per linear, or per group of linears that read the same input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.errors import BadInputError
from vlmexport.lower.onnx.packing import block_size, pack_matmul_nbits
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.manifest import QuantizedMember, QuantizedRecord
from vlmexport.plan import ExportPlan, WeightPlan
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.tensor import QuantizedTensor, stack_rows

MICROSOFT = "com.microsoft"
_NUMPY: dict[ir.DataType, type[np.generic]] = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@dataclass(frozen=True)
class LinearRef:
    """A linear layer by the whole-model names of its weight ``[out, in]`` and bias (``""`` for none)."""

    weight: str
    bias: str
    in_features: int
    out_features: int


@dataclass
class LinearEmitter:
    """Emits linear layers as the plan says, and collects the weight groups that the nodes need.

    `tensors` are the model's parameters by whole-model name, `float_type` the decoder's activation type. `wide` are
    weights whose products leave the range of float16: with a float16 activation type they are computed and handed on in
    float32. After the groups have been produced, `records` says which codes went into which initializer.
    """

    tensors: Mapping[str, torch.Tensor]
    plan: ExportPlan
    float_type: ir.DataType
    accuracy_level: int
    wide: frozenset[str] = frozenset()
    groups: list[WeightGroup] = field(default_factory=list)
    records: list[QuantizedRecord] = field(default_factory=list)

    def emit(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        """``x [..., K]`` times all `members` stacked along the output: ``[..., sum(out_features)]``.

        `x` may be wider than the activation type; the result is so only for members in `wide`.
        """
        keep_wide = any(m.weight in self.wide for m in members)
        kind = ir.DataType.FLOAT if keep_wide or x.dtype == ir.DataType.FLOAT else self.float_type
        x = cast(tape, x, kind)
        quantize = self.uniform(members) and self._planned(members[0]).action == "quantize"
        product = (self._quantized if quantize else self._dense)(tape, x, members, name)
        product.type = ir.TensorType(kind)
        return product if keep_wide else cast(tape, product, self.float_type)

    def uniform(self, members: tuple[LinearRef, ...]) -> bool:
        """True when all members are treated alike, so that one matrix can hold them."""
        first = self._planned(members[0])
        plans = [self._planned(m) for m in members]
        return all((p.action, p.scheme, p.dtype) == (first.action, first.scheme, first.dtype) for p in plans)

    def constant(self, name: str, tensor: torch.Tensor, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer of `tensor`'s shape in `dtype` (default: the activation type)."""
        kind = dtype or self.float_type
        value = initializer(name, kind, tensor.shape)
        self.groups.append(WeightGroup((value,), lambda: (checked_cast(name, tensor, kind),)))
        return value

    def _planned(self, member: LinearRef) -> WeightPlan:
        return self.plan.weight(member.weight)

    def _quantized(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        scheme = self._planned(members[0]).scheme
        if scheme is None:
            raise ValueError(f"{name}: planned to be quantized without a scheme")
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        block = block_size(columns, scheme.group_size)
        blocks = columns // block
        values = [
            initializer(f"{name}.codes", ir.DataType.UINT8, (rows, blocks, block * scheme.bits // 8)),
            initializer(f"{name}.scale", _dtype(x), (rows, blocks)),
        ]
        if not scheme.symmetric:
            values.append(initializer(f"{name}.zero_point", ir.DataType.UINT8, (rows, -(-blocks * scheme.bits // 8))))
        self.groups.append(WeightGroup(tuple(values), lambda: self._make_codes(members, name, _dtype(x))))
        attributes = {
            "K": columns,
            "N": rows,
            "bits": scheme.bits,
            "block_size": block,
            "accuracy_level": self.accuracy_level,
        }
        inputs: list[ir.Value | None] = [x, *values]
        bias = self._bias(members, name, _dtype(x))
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        return tape.op("MatMulNBits", inputs, attributes, domain=MICROSOFT)

    def _make_codes(self, members: tuple[LinearRef, ...], name: str, kind: ir.DataType) -> tuple[np.ndarray, ...]:
        tensors = [self._quantize(m) for m in members]
        ends = np.cumsum([t.shape[0] for t in tensors]).tolist()
        stacked = stack_rows(tensors)
        packed = pack_matmul_nbits(stacked, _NUMPY[kind])
        if not np.isfinite(packed.scale).all():
            raise BadInputError(
                f"{name}: a scale overflows FP16; keep this layer with --keep or use --decoder-dtype fp32"
            )
        self.records.append(
            QuantizedRecord(
                part="decoder",
                initializer=name,
                bits=stacked.bits,
                group_size=packed.block_size,
                symmetric=stacked.zero_point is None,
                in_features=stacked.shape[1],
                members=tuple(
                    QuantizedMember(m.weight, (end - t.shape[0], end), t.digest())
                    for m, t, end in zip(members, tensors, ends, strict=True)
                ),
            )
        )
        arrays = (packed.codes, packed.scale)
        return arrays if packed.zero_point is None else (*arrays, packed.zero_point)

    def _quantize(self, member: LinearRef) -> QuantizedTensor:
        scheme = self._planned(member).scheme
        if scheme is None:
            raise ValueError(f"{member.weight}: planned to be quantized without a scheme")
        return quantize_rtn(self.tensors[member.weight], scheme, member.weight)

    def _dense(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        stored = ir.DataType.FLOAT16 if self._planned(members[0]).dtype == "float16" else _dtype(x)
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        weight = initializer(name, stored, (columns, rows))
        self.groups.append(WeightGroup((weight,), lambda: (self._dense_weight(members, stored),)))
        operand = cast(tape, weight, _dtype(x))
        out = tape.op("MatMul", [x, operand])
        bias = self._bias(members, name, _dtype(x))
        return out if bias is None else tape.op("Add", [out, bias])

    def _dense_weight(self, members: tuple[LinearRef, ...], dtype: ir.DataType) -> np.ndarray:
        parts = [checked_cast(m.weight, self.tensors[m.weight].t(), dtype) for m in members]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _bias(self, members: tuple[LinearRef, ...], name: str, kind: ir.DataType) -> ir.Value | None:
        if not any(m.bias for m in members):
            return None
        rows = [self.tensors[m.bias].float() if m.bias else torch.zeros(m.out_features) for m in members]
        return self.constant(f"{name}.bias", torch.cat(rows), kind)


def cast(tape: Tape, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """`value` as `kind`: itself, or behind a Cast."""
    if _dtype(value) == kind:
        return value
    out = tape.op("Cast", [value], {"to": int(kind)})
    out.type, out.shape = ir.TensorType(kind), value.shape
    return out


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ValueError(f"{value.name} has no type yet")
    return value.dtype


def checked_cast(name: str, tensor: torch.Tensor, dtype: ir.DataType) -> np.ndarray:
    """`tensor` as a float32 or float16 array; raises `BadInputError` when a finite value overflows float16."""
    if dtype == ir.DataType.FLOAT:
        return tensor.float().contiguous().numpy()
    half = tensor.to(torch.float16).contiguous()
    if half.isinf().any() and not tensor.isinf().any():
        largest = float(tensor.abs().max())
        raise BadInputError(f"{name}: largest value {largest:.3g} overflows FP16 (65504); use --decoder-dtype fp32")
    return half.numpy()
