"""What the rules of the lint see: a graph by names, with the types and shapes that ONNX infers."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from vlmexport.engines import ShapeProfile

Severity: TypeAlias = Literal["error", "warning"]
# A dimension: its size, the name of its symbol, or None when unknown.
Dim: TypeAlias = int | str | None


@dataclass(frozen=True)
class Problem:
    """What a rule finds wrong: the reason, and what to do instead."""

    severity: Severity
    reason: str
    fix: str


@dataclass(frozen=True)
class Request:
    """What is linted: the model (functions inlined, types inferred), its folder, and what is asked of its engines."""

    model: onnx.ModelProto
    folder: Path
    opsets: dict[str, int]
    profiles: tuple[ShapeProfile, ...]
    weights: frozenset[str]


@dataclass(frozen=True)
class View:
    """One graph or subgraph. Every table holds the names of the graphs around it too.

    `outputs` are those of this graph. `dtypes` are `TensorProto` data types, `shapes` None where the rank is unknown.
    """

    graph: onnx.GraphProto
    nested: bool
    inputs: frozenset[str]
    outputs: frozenset[str]
    producers: MutableMapping[str, onnx.NodeProto]
    initializers: MutableMapping[str, onnx.TensorProto]
    dtypes: MutableMapping[str, int]
    shapes: MutableMapping[str, tuple[Dim, ...]]
    consumers: MutableMapping[str, list[onnx.NodeProto]]

    @staticmethod
    def of(graph: onnx.GraphProto, outer: View | None = None) -> View:
        """The view of `graph`, inside `outer` if it is a subgraph."""
        initializers = {t.name: t for t in graph.initializer}
        dtypes = {t.name: t.data_type for t in graph.initializer}
        shapes: dict[str, tuple[Dim, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                dtypes.setdefault(value.name, tensor.elem_type)
            if tensor.HasField("shape"):
                shapes.setdefault(value.name, tuple(map(_dim, tensor.shape.dim)))
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in filter(None, node.input):
                consumers.setdefault(name, []).append(node)
        producers = {name: node for node in graph.node for name in node.output if name}
        view = View(
            graph,
            outer is not None,
            outer.inputs if outer else frozenset(i.name for i in graph.input if i.name not in initializers),
            frozenset(o.name for o in graph.output),
            _within(producers, outer.producers if outer else None),
            _within(initializers, outer.initializers if outer else None),
            _within(dtypes, outer.dtypes if outer else None),
            _within(shapes, outer.shapes if outer else None),
            _within(consumers, outer.consumers if outer else None),
        )
        view._guess_dtypes()
        return view

    def _guess_dtypes(self) -> None:
        """What ONNX infers no type for (after an unknown operator) has the type of its first input."""
        for node in self.graph.node:
            known = [self.dtypes[name] for name in node.input if name in self.dtypes]
            for name in filter(None, node.output):
                if name not in self.dtypes and known:
                    self.dtypes[name] = known[0]

    def dtype(self, name: str) -> int | None:
        """The data type of a tensor, or None."""
        return self.dtypes.get(name)

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """The shape of a tensor, or None where its rank is unknown."""
        return self.shapes.get(name)

    def constant_tensor(self, name: str) -> onnx.TensorProto | None:
        """The initializer, or value of a Constant node, of that name; None for a computed tensor."""
        if name in self.initializers:
            return self.initializers[name]
        node = self.producers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        value = attributes(node)
        if "value" in value:
            tensor: onnx.TensorProto = value["value"]
            return tensor
        plain = next((v for k, v in value.items() if k in _PLAIN_CONSTANTS), None)
        return None if plain is None else numpy_helper.from_array(np.asarray(plain))

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """The values of a constant; None for a computed tensor and for one whose data lie outside the graph's file."""
        tensor = self.constant_tensor(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


@dataclass(frozen=True)
class Site:
    """One node where a rule looks."""

    node: onnx.NodeProto
    view: View
    request: Request

    @property
    def attributes(self) -> dict[str, Any]:
        """The node's attributes as Python values."""
        return attributes(self.node)

    def input(self, index: int) -> str:
        """The name of an input; empty when it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def dtype(self, index: int) -> int | None:
        """The data type of an input, or None."""
        return self.view.dtype(self.input(index))

    def shape(self, index: int) -> tuple[Dim, ...] | None:
        """The shape of an input, or None."""
        return self.view.shape(self.input(index))


NodeCheck: TypeAlias = Callable[[Site], Iterator[Problem]]
GraphCheck: TypeAlias = Callable[[Request], Iterator[tuple[str, Problem]]]


@dataclass(frozen=True)
class Rule:
    """A check of nodes: of the operators `ops`, or of all when there are none. The function says what it is."""

    name: str
    ops: tuple[str, ...]
    check: NodeCheck


@dataclass(frozen=True)
class GraphRule:
    """A check of the whole model, which yields the name of the input or tensor with each problem."""

    name: str
    check: GraphCheck


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values, strings decoded."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def type_name(dtype: int | None) -> str:
    """``FLOAT16`` of 10; ``type N`` of a number that ONNX has no name for."""
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    return "unknown" if dtype is None else names.get(dtype, f"type {dtype}")


def subgraphs(attribute: onnx.AttributeProto) -> tuple[onnx.GraphProto, ...]:
    """The graphs that an attribute holds."""
    return (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))


def all_sites(request: Request) -> Iterator[Site]:
    """Every node of the model, those of subgraphs after the node that holds them."""
    yield from _sites(View.of(request.model.graph), request)


def _sites(view: View, request: Request) -> Iterator[Site]:
    for node in view.graph.node:
        yield Site(node, view, request)
        for attribute in node.attribute:
            for graph in subgraphs(attribute):
                yield from _sites(View.of(graph, view), request)


def _within(names: dict[str, Any], outer: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
    return ChainMap(names, outer) if outer is not None else names


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return dim.dim_param or None


_PLAIN_CONSTANTS = ("value_float", "value_floats", "value_int", "value_ints")
