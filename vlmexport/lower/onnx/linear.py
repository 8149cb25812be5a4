"""Linear layers: one matrix product node per linear, or per group of linears that read the same input."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.errors import BadInputError
from vlmexport.lower.onnx.bnb4 import bnb4_initializers, bnb4_product, pack_bnb4
from vlmexport.lower.onnx.packing import pack_matmul_nbits
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.manifest import QuantizedMember, QuantizedRecord
from vlmexport.plan import ExportPlan, WeightPlan
from vlmexport.quantize.blocks import block_size
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.tensor import QuantizedTensor, stack_rows
from vlmexport.quantize.weights import DecoderWeights

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

    `weights` are the decoder's codes and floats by whole-model name, `float_type` the decoder's activation type. `wide`
    are weights whose products leave the range of float16: with a float16 activation type they are computed and handed
    on in float32. After the groups were produced, `records` says which codes went into which initializer of `part`.
    """

    weights: DecoderWeights
    plan: ExportPlan
    float_type: ir.DataType
    accuracy_level: int
    wide: frozenset[str] = frozenset()
    part: str = "decoder"
    groups: list[WeightGroup] = field(default_factory=list)
    records: list[QuantizedRecord] = field(default_factory=list)

    def emit(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        """``x [..., K]`` times all `members` stacked along the output: ``[..., sum(out_features)]``.

        `x` may be wider than the activation type; the result is so only for members in `wide`.
        """
        keep_wide = any(m.weight in self.wide or self.stays_wide(m.weight) for m in members)
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

    def stays_wide(self, name: str) -> bool:
        """Is the weight `name` planned to be stored in float32, whatever the activation type?

        Numbers that are no parameters go with those beside them.
        """
        planned = self.plan.by_name.get(name)
        if planned is not None:
            return planned.dtype == "float32"
        owner = name.rpartition(".")[0]
        beside = [w for w in self.plan.weights if w.name.rpartition(".")[0] == owner]
        return any(w.dtype == "float32" for w in beside)

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
        method = algorithm(scheme.algorithm)
        if method.codebook:
            return self._bnb4(tape, x, members, name, scheme.group_size)
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        block = block_size(columns, scheme.group_size)
        blocks = columns // block
        stored = ir.DataType.FLOAT if method.wide_scales else dtype_of(x)
        values = [
            initializer(f"{name}.codes", ir.DataType.UINT8, (rows, blocks, block * scheme.bits // 8)),
            initializer(f"{name}.scale", stored, (rows, blocks)),
        ]
        if not scheme.symmetric:
            values.append(initializer(f"{name}.zero_point", ir.DataType.UINT8, (rows, -(-blocks * scheme.bits // 8))))
        kinds = stored, dtype_of(x)
        self.groups.append(WeightGroup(tuple(values), lambda: self._make_codes(members, name, block, *kinds)))
        attributes = {
            "K": columns,
            "N": rows,
            "bits": scheme.bits,
            "block_size": block,
            "accuracy_level": self.accuracy_level,
        }
        inputs: list[ir.Value | None] = [x, values[0], cast(tape, values[1], dtype_of(x)), *values[2:]]
        bias = self._bias(members, name, dtype_of(x))
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        return tape.op("MatMulNBits", inputs, attributes, domain=MICROSOFT)

    def _make_codes(
        self, members: tuple[LinearRef, ...], name: str, block: int, stored: ir.DataType, computed: ir.DataType
    ) -> tuple[np.ndarray, ...]:
        tensors = [self._quantize(m, block, stored) for m in members]
        stacked = stack_rows(tensors)
        check_scale(stacked.scale.numpy(), computed, name)
        packed = pack_matmul_nbits(stacked, _NUMPY[stored])
        self._record(members, tensors, name, packed.block_size)
        arrays = (packed.codes, packed.scale)
        return arrays if packed.zero_point is None else (*arrays, packed.zero_point)

    def _bnb4(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str, block: int) -> ir.Value:
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        codes, absmax = bnb4_initializers(name, rows, columns, block)
        self.groups.append(WeightGroup((codes, absmax), lambda: self._make_bnb4(members, name, dtype_of(x))))
        out = bnb4_product(tape, x, codes, cast(tape, absmax, dtype_of(x)), (rows, columns), block)
        bias = self._bias(members, name, dtype_of(x))
        return out if bias is None else tape.op("Add", [out, bias])

    def _make_bnb4(self, members: tuple[LinearRef, ...], name: str, computed: ir.DataType) -> tuple[np.ndarray, ...]:
        tensors = [self.weights.quantized(m.weight) for m in members]
        stacked = stack_rows(tensors)
        codes, absmax = pack_bnb4(stacked)
        check_scale(absmax, computed, name)
        self._record(members, tensors, name, stacked.group_size, codebook="nf4")
        return codes, absmax

    def _record(
        self,
        members: tuple[LinearRef, ...],
        tensors: list[QuantizedTensor],
        name: str,
        block: int,
        codebook: str = "",
    ) -> None:
        ends = np.cumsum([t.shape[0] for t in tensors]).tolist()
        self.records.append(
            QuantizedRecord(
                part=self.part,
                initializer=name,
                bits=tensors[0].bits,
                group_size=block,
                symmetric=tensors[0].zero_point is None,
                in_features=tensors[0].shape[1],
                members=tuple(
                    QuantizedMember(m.weight, (end - t.shape[0], end), t.digest())
                    for m, t, end in zip(members, tensors, ends, strict=True)
                ),
                codebook=codebook,
            )
        )

    def _quantize(self, member: LinearRef, block: int, stored: ir.DataType) -> QuantizedTensor:
        """The codes in the operator's blocks of `block` columns, with scales that the type `stored` holds.

        A quantizer keeps float32 where a scale of the weight is subnormal in float16; an operator that computes in
        float16 takes no other, and what it then means is what the records must say.
        """
        codes = self.weights.quantized(member.weight).regrouped(block)
        if stored != ir.DataType.FLOAT16 or codes.scale.dtype == torch.float16:
            return codes
        check_scale(codes.scale.numpy(), stored, member.weight)
        return dataclasses.replace(codes, scale=codes.scale.to(torch.float16))

    def _dense(self, tape: Tape, x: ir.Value, members: tuple[LinearRef, ...], name: str) -> ir.Value:
        stored = ir.DataType.FLOAT16 if self._planned(members[0]).dtype == "float16" else dtype_of(x)
        rows, columns = sum(m.out_features for m in members), members[0].in_features
        weight = initializer(name, stored, (columns, rows))
        self.groups.append(WeightGroup((weight,), lambda: (self._dense_weight(members, stored),)))
        operand = cast(tape, weight, dtype_of(x))
        out = tape.op("MatMul", [x, operand])
        bias = self._bias(members, name, dtype_of(x))
        return out if bias is None else tape.op("Add", [out, bias])

    def _dense_weight(self, members: tuple[LinearRef, ...], dtype: ir.DataType) -> np.ndarray:
        parts = [checked_cast(m.weight, self.weights.tensor(m.weight).t(), dtype) for m in members]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _bias(self, members: tuple[LinearRef, ...], name: str, kind: ir.DataType) -> ir.Value | None:
        if not any(m.bias for m in members):
            return None
        rows = [self.weights.tensor(m.bias).float() if m.bias else torch.zeros(m.out_features) for m in members]
        return self.constant(f"{name}.bias", torch.cat(rows), kind)


def cast(tape: Tape, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """`value` as `kind`: itself, or behind a Cast."""
    if dtype_of(value) == kind:
        return value
    out = tape.op("Cast", [value], {"to": int(kind)})
    out.type, out.shape = ir.TensorType(kind), value.shape
    return out


def dtype_of(value: ir.Value) -> ir.DataType:
    """The element type of `value`; raises ValueError where it is not known yet."""
    if value.dtype is None:
        raise ValueError(f"{value.name} has no type yet")
    return value.dtype


def check_scale(scale: np.ndarray, computed: ir.DataType, name: str) -> None:
    """Refuse scales that leave the range of the type that the product computes in."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(scale.astype(_NUMPY[computed])).all()
    if not finite:
        raise BadInputError(f"{name}: a scale overflows FP16; keep this layer with --keep or use --decoder-dtype fp32")


def checked_cast(name: str, tensor: torch.Tensor, dtype: ir.DataType) -> np.ndarray:
    """`tensor` as a float32 or float16 array; raises `BadInputError` when a finite value overflows float16."""
    if dtype == ir.DataType.FLOAT:
        return tensor.float().contiguous().numpy()
    half = tensor.to(torch.float16).contiguous()
    if half.isinf().any() and not tensor.isinf().any():
        largest = float(tensor.abs().max())
        raise BadInputError(f"{name}: largest value {largest:.3g} overflows FP16 (65504); use --decoder-dtype fp32")
    return half.numpy()
