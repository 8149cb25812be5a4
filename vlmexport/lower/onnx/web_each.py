"""Towers that see one picture at a time, as a graph that takes all pictures at once: a loop over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from vlmexport.lower.onnx.weights import typed_value
from vlmexport.model.pictures import GRIDS, PIXELS, EachPicture

_NAME = "picture"
_INT64 = ir.DataType.INT64


def over_pictures(graph: ir.Graph, form: EachPicture) -> None:
    """Let `graph`, which gives the rows of one picture, take several and give the rows of all, in their order.

    Its input becomes ``pixel_values`` ``[pictures, channels, height, width]``, all of one size; where `form` has
    patches, ``[pictures, patches, values]`` with ``spatial_shapes`` int64 ``[pictures, 2]`` (rows, columns of each).
    What does not depend on the picture stays outside of the loop.
    """
    (one,), (rows,) = list(graph.inputs), list(graph.outputs)
    if one.shape is None or one.dtype is None or rows.dtype is None or rows.shape is None:
        raise ValueError("the vision graph has no types")
    inner = _after(graph, one)
    graph.remove(inner)
    if form.patches:
        pixels = typed_value(PIXELS, one.dtype, ["num_images", "num_patches", _size(one.shape[1])])
        grids = [typed_value(GRIDS, _INT64, ["num_images", 2])]
    else:
        pixels = typed_value(PIXELS, one.dtype, ["num_images", *(_size(dim) for dim in one.shape[1:])])
        grids = []
    number, go = typed_value(f"{_NAME}.number", _INT64, []), typed_value(f"{_NAME}.go", ir.DataType.BOOL, [])
    width = _size(rows.shape[-1])
    before = typed_value(f"{_NAME}.before", rows.dtype, [f"{_NAME}_rows_before", width])
    steps = _Steps(graph)
    taken = steps.add("Gather", [pixels, number], one.dtype, axis=0)
    taken = _grid(steps, taken, grids[0], number) if form.patches else _lead(steps, taken)
    ir.convenience.replace_all_uses_with(one, taken)
    name, rows.name = rows.name, f"{_NAME}.rows"
    ends = _Steps(graph, f"{_NAME}.end")
    outputs = [ends.add("Identity", [go], go.dtype), ends.add("Concat", [before, rows], rows.dtype, axis=0)]
    nodes = [*steps.nodes, *inner, *ends.nodes]
    body = ir.Graph([number, go, before], outputs, nodes=nodes, name=_NAME)
    loop = _loop(graph, pixels, body, before, width)
    loop.name, loop.shape = name, ir.Shape(rows.shape)
    graph.inputs.clear()
    graph.inputs.extend([pixels, *grids])
    graph.outputs.clear()
    graph.outputs.append(loop)


@dataclass
class _Steps:
    """Nodes one after the other, their values named; constants are `graph`'s."""

    graph: ir.Graph
    prefix: str = _NAME
    nodes: list[ir.Node] = field(default_factory=list)

    def add(self, operator: str, inputs: list[ir.Value], kind: ir.DataType | None, **attributes: int) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        node.name = node.outputs[0].name = f"{self.prefix}.{len(self.nodes)}"
        if kind is not None:
            node.outputs[0].type = ir.TensorType(kind)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, *numbers: int) -> ir.Value:
        """Integers ``[len(numbers)]``."""
        name = f"{_NAME}.constant.{'_'.join(map(str, numbers))}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(list(numbers), dtype=_INT64, name=name)
        shape = ir.Shape([len(numbers)])
        value = ir.Value(name=name, type=ir.TensorType(_INT64), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _after(graph: ir.Graph, start: ir.Value) -> list[ir.Node]:
    """The nodes that depend on `start`, in order."""
    reached, found = {id(start)}, []
    for node in graph:
        if any(id(value) in reached for value in _reads(node)):
            found.append(node)
            reached |= {id(value) for value in node.outputs}
    return found


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What the node reads, inside of its graphs as well."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                yield from (value for value in inner.inputs if value is not None)


def _lead(steps: _Steps, picture: ir.Value) -> ir.Value:
    return steps.add("Unsqueeze", [picture, steps.constant(0)], picture.dtype)


def _grid(steps: _Steps, patches: ir.Value, grids: ir.Value, number: ir.Value) -> ir.Value:
    """``[1, values, rows, columns]`` of the picture's patches ``[patches, values]``, without its padding."""
    sides = steps.add("Gather", [grids, number], _INT64, axis=0)
    count = steps.add("ReduceProd", [sides, steps.constant(0)], _INT64, keepdims=1)
    whole = steps.add("Slice", [patches, steps.constant(0), count, steps.constant(0)], patches.dtype)
    columns = steps.add("Transpose", [whole], patches.dtype)
    shape = steps.add("Concat", [steps.constant(1, -1), sides], _INT64, axis=0)
    return steps.add("Reshape", [columns, shape], patches.dtype)


def _loop(graph: ir.Graph, pixels: ir.Value, body: ir.Graph, before: ir.Value, width: int | str) -> ir.Value:
    """The rows of all pictures, from none: a loop of `body` over `pixels`."""
    if before.dtype is None or isinstance(width, str):
        raise ValueError("the vision graph has no type")
    steps = _Steps(graph, f"{_NAME}.loop")
    shape = steps.add("Shape", [pixels], _INT64, start=0, end=1)
    count = steps.add("Squeeze", [shape, steps.constant(0)], _INT64)
    zero = steps.add("ConstantOfShape", [steps.constant(0, width)], ir.DataType.FLOAT)
    start = steps.add("Cast", [zero], before.dtype, to=int(before.dtype))
    graph.extend(steps.nodes)
    loop = ir.node("Loop", [count, None, start], {"body": body})
    loop.name = f"{_NAME}.loop"
    loop.outputs[0].type = ir.TensorType(before.dtype)
    graph.append(loop)
    return loop.outputs[0]


def _size(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value)
