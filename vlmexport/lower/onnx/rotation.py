"""Rotary positions as a standard operator: ``RotaryEmbedding`` (opset 23) with tables for each token."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.linear import cast

_INT64 = ir.DataType.INT64
_SPLIT_HEADS = [0, 2, 1, 3]  # [B, S, N, D] to [B, N, S, D]


@dataclass
class Rotations:
    """The rotations of one graph; each table is cut and cast once."""

    tape: Tape
    tables: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)
    constants: dict[str, ir.Value] = field(default_factory=dict)

    def emit(self, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """The neutral ``Rotation`` `node` of x ``[B, N, S, D]`` by tables ``[B, S, width]``; the result is like x.

        Where x was split into heads just before, its tokens ``[B, S, N * D]`` are rotated and split again, so that an
        operator which takes them as they were finds them.
        """
        if x.dtype is None or x.shape is None:
            raise ValueError("a rotation needs values with types and shapes")
        heads, head_dim, width = _static(x, 1), _static(x, 3), _static(cos, 2)
        attributes: dict[str, int] = {"interleaved": node.attributes["interleaved"].as_int()}
        if width != head_dim:
            attributes["rotary_embedding_dim"] = width
        doubled = node.attributes["doubled"].as_string()
        halves = [self._half(table, x.dtype, doubled, width) for table in (cos, sin)]
        split = _producer(x, "Transpose")
        if split is None or list(split.attributes["perm"].as_ints()) != _SPLIT_HEADS:
            return self.tape.op("RotaryEmbedding", [x, *halves], attributes)
        turned = self.tape.op(
            "RotaryEmbedding", [self._flat(split, heads * head_dim), *halves], {**attributes, "num_heads": heads}
        )
        turned.type, turned.shape = x.type, ir.Shape([x.shape[0], x.shape[2], heads * head_dim])
        shape = self._shape([0, 0, heads, head_dim])
        return self.tape.op("Transpose", [self.tape.op("Reshape", [turned, shape])], {"perm": _SPLIT_HEADS})

    def _flat(self, split: ir.Node, width: int) -> ir.Value:
        """The tokens ``[B, S, width]`` that the transposition `split` made heads of."""
        tokens = split.inputs[0]
        reshape = _producer(tokens, "Reshape")
        source = None if reshape is None else reshape.inputs[0]
        if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == width:
            return source
        return self.tape.op("Reshape", [tokens, self._shape([0, 0, width])])

    def _half(self, table: ir.Value, kind: ir.DataType, doubled: str, width: int) -> ir.Value:
        if (table, kind) not in self.tables:
            stop, step = (width, 2) if doubled == "neighbours" else (width // 2, 1)
            cut = {"starts": 0, "ends": stop, "axes": 2, "steps": step}
            named = [self._constant([value], f"rotation.{name}.{value}") for name, value in cut.items()]
            half = self.tape.op("Slice", [table, *named])
            half.type = table.type
            self.tables[table, kind] = cast(self.tape, half, kind)
        return self.tables[table, kind]

    def _shape(self, dims: list[int]) -> ir.Value:
        return self._constant(dims, f"rotation.shape.{'x'.join(map(str, dims))}")

    def _constant(self, values: list[int], name: str) -> ir.Value:
        if name not in self.constants:
            self.constants[name] = self.tape.initializer(ir.tensor(values, dtype=_INT64, name=name))
        return self.constants[name]


def _static(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if isinstance(size, int):
        return size
    raise ValueError(f"{value.name} has no fixed size on axis {axis}")


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None
