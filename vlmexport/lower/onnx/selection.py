"""Rows that a vision encoder leaves out: how many is only known when the graph runs, so it must keep them all.

Encoders drop pictures that are padding (rows of zeros, for prompts with fewer pictures than their neighbours) with
``x[mask]``, which a trace says as ``GatherND(x, Transpose(NonZero(mask)))``. Runtimes that plan their memory ahead have
no ``NonZero``. Whoever calls them gives only pictures that count, and for those the selection is every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch.utils._python_dispatch import TorchDispatchMode

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.parts import Part

# The outcome, or the shape of it, depends on values: no memory plan made ahead can hold it.
_DATA_DEPENDENT = frozenset({"NonZero", "Compress", "Unique", "If", "Loop", "Scan"})
_INT64 = ir.DataType.INT64
_PROBE_SIZES = ((3, 4, 2), (5, 2, 3))


def keep_every_row(model: ir.Model, part: Part) -> None:
    """Turn each selection of rows in `model` into all rows, the selected axes flattened to one.

    Values must still have the tracer's ranks. Raises `UnsupportedModelError` naming the node when something else reads
    what the selection found, when `part` drops rows of its own examples, or when it does not drop rows of zeros (then
    they are no padding, and no caller knows which rows to leave out).
    """
    graph = model.graph
    selections = 0
    for node in list(graph):
        mask = None if node.op_type != "GatherND" else _selecting_mask(node)
        if mask is not None:
            _take_all(graph, node, mask.shape.rank() if mask.shape is not None else 0)
            selections += 1
    RemoveUnusedNodesPass()(model)
    for node in graph:
        if node.domain == "" and node.op_type in _DATA_DEPENDENT:
            raise UnsupportedModelError(
                f"{part.role}: node {node.name or node.outputs[0].name} ({node.op_type}) depends on values; TensorRT "
                f"takes only selections of rows that drop padding{_readers(node)}"
            )
    if selections:
        _prove_padding(part)


def _readers(node: ir.Node) -> str:
    names = [f"{user.op_type} {user.name or user.outputs[0].name}" for user, _ in node.outputs[0].uses()]
    return f" (it is read by {', '.join(names[:2])})" if names else ""


def _selecting_mask(node: ir.Node) -> ir.Value | None:
    """The boolean mask whose true positions, in order, are the indices of a GatherND; None when they are another's."""
    indices = node.inputs[1]
    if indices is None or ("batch_dims" in node.attributes and node.attributes["batch_dims"].as_int() != 0):
        return None
    found = _index_nodes(indices)
    if found is None:
        return None
    mask, nodes = found
    rank = None if mask.shape is None else mask.shape.rank()
    if not rank or mask.dtype != ir.DataType.BOOL:
        return None
    function: Any = _evaluator(mask, nodes, indices)
    fixed = [dim if isinstance(dim, int) else None for dim in mask.shape or ()]
    for sizes in _PROBE_SIZES:
        shape = [free if size is None else size for size, free in zip(fixed, sizes, strict=False)]
        probe = np.random.default_rng(0).random(shape) < 0.5
        try:
            found_rows = function.run(None, {str(mask.name): probe})[0]
        except (ValueError, RuntimeError):
            return None
        if not np.array_equal(found_rows, np.argwhere(probe)):
            return None
    return mask


def _index_nodes(indices: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """What is between one NonZero and `indices`, NonZero first; None when anything else but constants comes in."""
    nodes: dict[ir.Node, None] = {}
    mask: ir.Value | None = None
    todo = [indices]
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None:
            if value.const_value is None:
                return None
            continue
        if node in nodes:
            continue
        nodes[node] = None
        if node.op_type == "NonZero":
            if mask is not None:
                return None
            mask = node.inputs[0]
        else:
            todo += [v for v in node.inputs if v is not None]
    if mask is None:
        return None
    graph = next(iter(nodes)).graph
    return mask, [node for node in graph or () if node in nodes]


def _evaluator(mask: ir.Value, nodes: Sequence[ir.Node], indices: ir.Value) -> ReferenceEvaluator:
    """`indices` as a function of `mask`, in ONNX's own reference implementation."""
    constants = {v for n in nodes for v in n.inputs if v is not None and v.producer() is None and v is not mask}
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "indices",
        [onnx.helper.make_value_info(str(mask.name), onnx.helper.make_tensor_type_proto(onnx.TensorProto.BOOL, None))],
        [onnx.helper.make_value_info(str(indices.name), onnx.TypeProto())],
        [onnx.numpy_helper.from_array(v.const_value.numpy(), v.name) for v in constants if v.const_value is not None],
    )
    opset = mask.graph.opset_imports if mask.graph is not None else {}
    return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset[""])]))


def _take_all(graph: ir.Graph, node: ir.Node, axes: int) -> None:
    """Replace the selection by its data, the first `axes` axes flattened to one."""
    data, out = node.inputs[0], node.outputs[0]
    if data is None:
        raise ValueError(f"{node.name} selects from nothing")
    if axes == 1:
        ir.convenience.replace_all_uses_with(out, data, replace_graph_outputs=True)
    else:
        rows = ir.Value(
            name=f"{out.name}.rows", shape=ir.Shape([1]), type=ir.TensorType(_INT64), const_value=ir.tensor([-1])
        )
        graph.register_initializer(rows)
        rest = ir.node("Shape", [data], {"start": axes})
        shape = ir.node("Concat", [rows, rest.outputs[0]], {"axis": 0})
        flat = ir.node("Reshape", [data, shape.outputs[0]])
        for step in (rest, shape):
            step.outputs[0].type = ir.TensorType(_INT64)
        flat.outputs[0].type, flat.outputs[0].shape = out.type, out.shape
        graph.insert_before(node, [rest, shape, flat])
        ir.convenience.replace_all_uses_with(out, flat.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Selections(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, notes whether a boolean index left a row out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dropped = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            self.dropped |= any(not bool(mask.all()) for mask in masks)
        return func(*args, **(kwargs or {}))


def _prove_padding(part: Part) -> None:
    """Raise unless `part` keeps every row of its examples, and drops a row of zeros that is added to the first."""
    given = {dim for spec in part.signature.inputs for dim in spec.dims}
    found = [dim for spec in part.signature.outputs for dim in spec.dims if isinstance(dim, str) and dim not in given]
    with torch.no_grad(), _Selections() as ordinary:
        kept = _outputs(part, part.examples[0])
    if found or ordinary.dropped:
        raise UnsupportedModelError(
            f"{part.role}: it drops rows of an ordinary picture, not only padding; TensorRT cannot express that"
        )
    with torch.no_grad(), _Selections() as selections:
        padded = _outputs(part, _with_zero_row(part, part.examples[0]))
    alike = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-3) for a, b in zip(kept, padded, strict=True))
    if not (selections.dropped and alike):
        raise UnsupportedModelError(
            f"{part.role}: it selects rows, but not by leaving out rows of zeros; TensorRT cannot express that"
        )


def _outputs(part: Part, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    out = part.module(**inputs)
    return out if isinstance(out, tuple) else (out,)


def _with_zero_row(part: Part, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`example` with one more row of zeros on the first axis that varies, of every input that has that axis."""
    names = [dim for spec in part.signature.inputs for dim in spec.dims if isinstance(dim, str)]
    padded = dict(example)
    for spec in part.signature.inputs:
        if names and names[0] in spec.dims:
            axis, tensor = spec.dims.index(names[0]), example[spec.name]
            padded[spec.name] = torch.cat([tensor, torch.zeros_like(tensor.narrow(axis, 0, 1))], dim=axis)
    return padded
