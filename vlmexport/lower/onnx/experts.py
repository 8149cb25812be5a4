"""Experts in a graph: rows are sorted by their expert, and an ``If`` for each runs it only where rows came to it.

Standard operators and those of the linear layers alone. Rows go to the experts in the order of the experts' numbers
and come back to their own places, so a row's results are weighted and added in the order in which it chose them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.linear import LinearRef, cast, dtype_of
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.traced_values import required, static

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class ExpertRegion:
    """The traced nodes of one expert: `first` is ``ExpertIn``, `last` ``ExpertOut``, `inside` what is between them."""

    first: ir.Node
    inside: tuple[ir.Node, ...]
    last: ir.Node

    @property
    def name(self) -> str:
        """A name that no other region of the trace has."""
        return str(self.first.outputs[0].name)

    def parameter(self, node: ir.Node) -> str | None:
        """The packed parameter that `node` multiplies by; None for anything but a product with an expert's matrix."""
        product = (node.domain, node.op_type) == (DOMAIN, "ExpertLinear")
        return node.attributes["weight"].as_string() if product else None

    @property
    def experts(self) -> int:
        """How many experts the region stands for."""
        return self.first.attributes["experts"].as_int()


def without_regions(nodes: list[ir.Node]) -> list[ir.Node | ExpertRegion]:
    """`nodes` in order, with each region of an expert in the place of its ``ExpertOut``."""
    out: list[ir.Node | ExpertRegion] = []
    first: ir.Node | None = None
    inside: list[ir.Node] = []
    made: set[ir.Value] = set()
    for node in nodes:
        kind = node.op_type if node.domain == DOMAIN else ""
        if kind == "ExpertIn":
            first, inside, made = node, [], {node.outputs[0]}
        elif kind == "ExpertOut" and first is not None:
            out.append(ExpertRegion(first, tuple(inside), node))
            first = None
        elif first is not None and any(v in made for v in node.inputs):
            inside.append(node)
            made.update(node.outputs)
        else:
            out.append(node)
    return out


@dataclass(frozen=True)
class _Sorted:
    """Rows in the order of their experts: `rows` ``[R, H]`` and how many each expert has, int64 ``[E]``."""

    rows: ir.Value
    counts: ir.Value


@dataclass(frozen=True)
class ExpertEmitter:
    """Emits one `region` for all its experts; `tape` is the main graph's, names begin with `prefix`.

    `one` emits what an expert does with its rows: given a tape for its nodes, the rows and the expert's number, it
    returns the result.
    """

    tape: Tape
    prefix: str
    region: ExpertRegion
    one: Callable[[Tape, ir.Value, int], ir.Value]

    def emit(self, rows: ir.Value, routing: list[ir.Value]) -> ir.Value:
        """The results ``[rows, outputs]``; `routing` holds each row's experts and their weights, or nothing."""
        if not routing:
            return self.dense(rows)
        chosen, weights = routing
        return self.routed(rows, chosen, weights)

    def routed(self, rows: ir.Value, chosen: ir.Value, weights: ir.Value) -> ir.Value:
        """``[T, H]``: rows ``[T, H]`` through their `chosen` experts ``[T, k]``, weighted by ``[T, k]`` and added."""
        each = static(required(self.region.first.inputs[1]), 1)
        flat = self._op("Reshape", [chosen, self._ints("flat", [-1])], _INT64)
        size = self._op("Shape", [flat], _INT64)
        order = self._order(flat, size)
        row = self._op("Div", [order, self._ints("each", each)], _INT64)
        one_hot = self._op(
            "Equal",
            [self._op("Unsqueeze", [flat, self._ints("last", [-1])], _INT64), self._numbers()],
            ir.DataType.BOOL,
        )
        together = _Sorted(self._op("Gather", [rows, row], dtype_of(rows)), self._count(one_hot, 0))
        made = self._through(together)
        width = self._width
        back = self._op("Gather", [made, self._order(order, size)], dtype_of(made))
        apart = self._op("Reshape", [back, self._ints("apart", [-1, each, width])], dtype_of(made))
        factor = self._op("Unsqueeze", [cast(self.tape, weights, dtype_of(made)), self._ints("last", [-1])], made.dtype)
        weighted = self._op("Mul", [apart, factor], dtype_of(made))
        return self._op("ReduceSum", [weighted, self._ints("one", [1])], dtype_of(made), {"keepdims": 0})

    def dense(self, rows: ir.Value) -> ir.Value:
        """``[E * T, H]``: all experts' rows ``[E * T, H]`` through them; rows of zeros are left out and give zeros."""
        kind = dtype_of(rows)
        zero = self._constant("zero", ir.tensor(0.0, dtype=kind))
        empty = self._op("Equal", [rows, zero], ir.DataType.BOOL)
        used = self._op("Cast", [self._op("Not", [empty], ir.DataType.BOOL)], _INT64, {"to": int(_INT64)})
        used = self._op("ReduceMax", [used, self._ints("one", [1])], _INT64, {"keepdims": 0})
        each = self._op("Reshape", [used, self._ints("each", [self.region.experts, -1])], _INT64)
        counts = self._op("ReduceSum", [each, self._ints("one", [1])], _INT64, {"keepdims": 0})
        places = self._op("Transpose", [self._op("NonZero", [used], _INT64)], _INT64, {"perm": [1, 0]})
        made = self._through(_Sorted(self._op("GatherND", [rows, places], kind), counts))
        length = self._op("Shape", [rows], _INT64, {"start": 0, "end": 1})
        shape = self._op("Concat", [length, self._ints("width", [self._width])], _INT64, {"axis": 0})
        nothing = self._op("ConstantOfShape", [shape], dtype_of(made), {"value": ir.tensor([0.0], dtype=made.dtype)})
        return self._op("ScatterND", [nothing, places, made], dtype_of(made))

    def _through(self, given: _Sorted) -> ir.Value:
        """Sorted rows through their experts."""
        kind = dtype_of(given.rows)
        some = self._op("Greater", [given.counts, self._ints("none", [0])], ir.DataType.BOOL)
        flags = self._parts("Split", [some], {"axis": 0, "num_outputs": self.region.experts}, ir.DataType.BOOL)
        parts = self._parts("Split", [given.rows, given.counts], {"axis": 0}, kind)
        made = [self._if(expert, flags[expert], parts[expert]) for expert in range(self.region.experts)]
        return self._op("Concat", made, dtype_of(made[0]), {"axis": 0})

    def _if(self, expert: int, some: ir.Value, rows: ir.Value) -> ir.Value:
        """The results of one expert; without rows there are none."""
        tape = Tape()
        made = self.one(tape, rows, expert)
        then = _branch(tape, made, f"{self.prefix}expert.{expert}")
        tape = Tape()
        nothing = tape.op("Cast", [rows], {"to": int(dtype_of(made))})
        nothing.type = made.type
        other = _branch(tape, nothing, f"{self.prefix}expert.{expert}.idle")
        return self._op("If", [some], dtype_of(made), {"then_branch": then, "else_branch": other})

    @property
    def _width(self) -> int:
        return static(required(self.region.last.inputs[0]), 1)

    def _order(self, values: ir.Value, size: ir.Value) -> ir.Value:
        """The places of int64 ``values [R]`` from the smallest to the largest; of a permutation, its inverse."""
        out = self.tape.op_multi_out("TopK", [values, size], {"axis": 0, "largest": 0, "sorted": 1}, num_outputs=2)
        for value in out:
            value.type = ir.TensorType(_INT64)
        return out[1]

    def _count(self, one_hot: ir.Value, axis: int) -> ir.Value:
        counted = self._op("Cast", [one_hot], _INT64, {"to": int(_INT64)})
        return self._op("ReduceSum", [counted, self._ints("axis", [axis])], _INT64, {"keepdims": 0})

    def _numbers(self) -> ir.Value:
        return self._ints("numbers", [list(range(self.region.experts))])

    def _parts(self, op: str, inputs: list[ir.Value], attributes: dict[str, int], kind: ir.DataType) -> list[ir.Value]:
        out = self.tape.op_multi_out(op, inputs, attributes, num_outputs=self.region.experts)
        for value in out:
            value.type = ir.TensorType(kind)
        return list(out)

    def _op(
        self, op: str, inputs: list[ir.Value], kind: ir.DataType | None, attributes: dict[str, object] | None = None
    ) -> ir.Value:
        out = self.tape.op(op, inputs, attributes)  # type: ignore[arg-type]
        if kind is not None:
            out.type = ir.TensorType(kind)
        return out

    def _ints(self, name: str, values: object) -> ir.Value:
        return self._constant(name, ir.tensor(values, dtype=_INT64))  # type: ignore[arg-type]

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = self.tape.initializer(
            ir.Tensor(tensor.numpy(), name=f"{self.prefix}{name}.{len(self.tape.initializers)}")
        )
        return value


def expert_ref(node: ir.Node, parameter: str, expert: int) -> LinearRef:
    """The linear layer that an ``ExpertLinear`` is for one expert of the packed `parameter`."""
    sizes = {key: node.attributes[key].as_int() for key in ("in_features", "out_features")}
    return LinearRef(f"{parameter}.{expert}", "", **sizes)


def _branch(tape: Tape, result: ir.Value, name: str) -> ir.Graph:
    """A subgraph without inputs; its values are named so that they hide none of the graph around it.

    Their shapes are left open: a trace does not know how many rows an expert gets.
    """
    for index, node in enumerate(tape.nodes):
        for place, value in enumerate(node.outputs):
            value.name, value.shape = f"{name}.{index}.{place}", None
    return ir.Graph([], [result], nodes=tape.nodes, initializers=tape.initializers, name=name)
