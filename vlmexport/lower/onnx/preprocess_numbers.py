"""Numbers inside a graph under construction, so that a rule about sizes reads like the formula it is.

`Number` is a scalar or tensor of int64, float64 or bool. Float64 is IEEE double in ONNX Runtime as in Python and C: a
formula gives the same value here as there, down to its roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

_INT, _DOUBLE, _BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL
Plain = int | float


@dataclass
class Sheet:
    """The graph under construction; equal constants are one initializer."""

    tape: Tape = field(default_factory=Tape)
    _constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """An initializer with `value` (a number or nested lists of them)."""
        array = np.array(value, dtype.numpy())
        key = (dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self._constants[key] = self.tape.initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A 1-D int64 initializer: axes, shapes, bounds."""
        return self.constant(list(values), _INT)

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """One node of the main domain with one output."""
        return self.tape.op(kind, list(inputs), attributes)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`."""
        return self.op("Cast", value, to=int(dtype))

    def number(self, value: Plain) -> Number:
        """A constant scalar: int64 for an int, float64 for a float."""
        kind = _INT if isinstance(value, int) else _DOUBLE
        return Number(self, self.constant(value, kind), kind)

    def numbers(self, values: Sequence[Plain]) -> Number:
        """Constants in a row: int64 where all are ints, else float64."""
        kind = _INT if all(isinstance(value, int) for value in values) else _DOUBLE
        return Number(self, self.constant(list(values), kind), kind)

    def size(self, value: ir.Value, axis: int) -> Number:
        """The length of one axis of `value`, an int64 scalar."""
        return Number(self, self.op("Squeeze", self.op("Shape", value, start=axis, end=axis + 1)), _INT)

    def range(self, end: Number) -> Number:
        """0, 1 … `end` - 1 as int64 ``[end]``."""
        return Number(self, self.op("Range", self.number(0).value, end.value, self.number(1).value), _INT)

    def shape(self, *sizes: Number | int) -> ir.Value:
        """A shape of numbers, some of which are known only when the graph runs (-1: the rest)."""
        parts = [
            self.integers([size]) if isinstance(size, int) else self.op("Unsqueeze", size.value, self.integers([0]))
            for size in sizes
        ]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, value: ir.Value, *sizes: Number | int) -> ir.Value:
        """`value` in another shape."""
        if all(isinstance(size, int) for size in sizes):
            return self.op("Reshape", value, self.integers([int(str(size)) for size in sizes]))
        return self.op("Reshape", value, self.shape(*sizes))

    def cut(self, value: ir.Value, start: Number | int, end: Number | int, axis: int) -> ir.Value:
        """``value[start:end]`` along `axis`."""
        return self.op("Slice", value, self.shape(start), self.shape(end), self.integers([axis]))

    def turned_unless(self, condition: Number, picture: ir.Value) -> ir.Value:
        """`picture` ``[a, b, c]`` as ``[b, a, c]`` unless the scalar `condition` holds."""
        branches = {}
        for name, node in (
            ("then_branch", ir.node("Identity", [picture])),
            ("else_branch", ir.node("Transpose", [picture], {"perm": [1, 0, 2]})),
        ):
            node.outputs[0].name = f"{name}.{len(self.tape.nodes)}"
            branches[name] = ir.Graph([], node.outputs, nodes=[node], name=name)
        return self.op("If", condition.value, **branches)


@dataclass(frozen=True, eq=False)
class Number:
    """A value of a `Sheet` with the operators of Python: ``/`` is true division, in float64 for integers too."""

    sheet: Sheet
    value: ir.Value
    kind: ir.DataType

    def __add__(self, other: Number | Plain) -> Number:
        return self._with("Add", other)

    def __sub__(self, other: Number | Plain) -> Number:
        return self._with("Sub", other)

    def __mul__(self, other: Number | Plain) -> Number:
        return self._with("Mul", other)

    def __truediv__(self, other: Number | Plain) -> Number:
        return self.double()._with("Div", other)

    def __lt__(self, other: Number | Plain) -> Number:
        return self._with("Less", other, _BOOL)

    def __le__(self, other: Number | Plain) -> Number:
        return self._with("LessOrEqual", other, _BOOL)

    def __gt__(self, other: Number | Plain) -> Number:
        return self._with("Greater", other, _BOOL)

    def __ge__(self, other: Number | Plain) -> Number:
        return self._with("GreaterOrEqual", other, _BOOL)

    def equals(self, other: Number | Plain) -> Number:
        """Where both are the same, as bool."""
        return self._with("Equal", other, _BOOL)

    def __and__(self, other: Number) -> Number:
        return self._with("And", other)

    def negated(self) -> Number:
        """Of a bool: where it is false."""
        return self._alone("Not")

    def double(self) -> Number:
        """As float64."""
        return self if self.kind == _DOUBLE else Number(self.sheet, self.sheet.cast(self.value, _DOUBLE), _DOUBLE)

    def integer(self) -> Number:
        """As int64; the fraction is dropped, as ``int()`` does."""
        return self if self.kind == _INT else Number(self.sheet, self.sheet.cast(self.value, _INT), _INT)

    def floor(self) -> Number:
        """The largest whole number that is not above, as int64."""
        return self.floored().integer()

    def floored(self) -> Number:
        """The largest whole number that is not above, as float64."""
        return self._alone("Floor")

    def ceil(self) -> Number:
        """The smallest whole number that is not below, as int64."""
        return self._alone("Ceil").integer()

    def round(self) -> Number:
        """The nearest whole number as int64, ties to the even one, as ``round()`` does."""
        return self._alone("Round").integer()

    def absolute(self) -> Number:
        """Without its sign."""
        return self._alone("Abs")

    def sign(self) -> Number:
        """-1, 0 or 1."""
        return self._alone("Sign")

    def sine(self) -> Number:
        """The sine of float64 radians."""
        return self._alone("Sin")

    def root(self) -> Number:
        """The square root of a float64."""
        return self._alone("Sqrt")

    def least(self, other: Number | Plain) -> Number:
        """The smaller of both."""
        return self._with("Min", other)

    def most(self, other: Number | Plain) -> Number:
        """The larger of both."""
        return self._with("Max", other)

    def where(self, yes: Number | Plain, no: Number | Plain) -> Number:
        """`yes` where this (bool) is true, else `no`; both of one kind."""
        first = yes if isinstance(yes, Number) else no
        kind = first.kind if isinstance(first, Number) else _DOUBLE
        values = [self._like(one, kind).value for one in (yes, no)]
        return Number(self.sheet, self.sheet.op("Where", self.value, *values), kind)

    def only_if(self, condition: Number) -> Number:
        """The scalar itself; where `condition` is false an index is out of bounds, which stops the run."""
        alone = Number(self.sheet, self.sheet.shape(self), self.kind)
        return alone.take(condition.where(self.sheet.number(0), 1))

    def column(self) -> Number:
        """``[..., n]`` as ``[..., n, 1]``."""
        return self._alone("Unsqueeze", self.sheet.integers([-1]))

    def row(self) -> Number:
        """``[..., n]`` as ``[..., 1, n]``."""
        return self._alone("Unsqueeze", self.sheet.integers([-2]))

    def take(self, indices: Number) -> Number:
        """The entries of the first axis at `indices`."""
        return self._alone("Gather", indices.value)

    def total(self) -> Number:
        """The sum over the last axis, which stays with length 1."""
        return self._alone("ReduceSum", self.sheet.integers([-1]))

    def largest(self) -> Number:
        """The largest of all, a scalar."""
        return Number(self.sheet, self.sheet.op("ReduceMax", self.value, keepdims=0), self.kind)

    def smallest(self) -> Number:
        """The smallest of all, a scalar."""
        return Number(self.sheet, self.sheet.op("ReduceMin", self.value, keepdims=0), self.kind)

    def _alone(self, kind: str, *inputs: ir.Value) -> Number:
        return Number(self.sheet, self.sheet.op(kind, self.value, *inputs), self.kind)

    def _with(self, kind: str, other: Number | Plain, result: ir.DataType | None = None) -> Number:
        wide = other.kind if isinstance(other, Number) else _DOUBLE if isinstance(other, float) else self.kind
        common = _DOUBLE if _DOUBLE in (self.kind, wide) else self.kind
        left, right = self._like(self, common), self._like(other, common)
        return Number(self.sheet, self.sheet.op(kind, left.value, right.value), result or common)

    def _like(self, other: Number | Plain, kind: ir.DataType) -> Number:
        if not isinstance(other, Number):
            return Number(self.sheet, self.sheet.constant(other, kind), kind)
        return other.double() if kind == _DOUBLE else other
