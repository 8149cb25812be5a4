"""Attention masks that mostly hide nothing: take the runtime's fast path when they do not."""

from __future__ import annotations

import onnx_ir as ir

from vlmexport.lower.onnx.linear import MICROSOFT

_BIAS = 5  # input of MultiHeadAttention


def skip_empty_masks(graph: ir.Graph) -> None:
    """Let each ``MultiHeadAttention`` with a bias run without it when the bias is zero everywhere.

    A bias costs three times the attention itself on a CPU (a full score matrix in memory), and image processors pad
    rarely; whether a mask hides anything is only known when the graph runs.
    """
    empty: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        bias = node.inputs[_BIAS] if node.op_type == "MultiHeadAttention" and len(node.inputs) > _BIAS else None
        if bias is None:
            continue
        if bias not in empty:
            empty[bias] = _is_zero(graph, node, bias)
        out = node.outputs[0]
        branches = {"then_branch": _branch(node, _BIAS - 2), "else_branch": _branch(node, _BIAS + 1)}
        choice = ir.node("If", [empty[bias]], branches)
        choice.outputs[0].type, choice.outputs[0].shape = out.type, out.shape
        choice.outputs[0].name = out.name
        graph.insert_before(node, choice)
        ir.convenience.replace_all_uses_with(out, choice.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _is_zero(graph: ir.Graph, place: ir.Node, bias: ir.Value) -> ir.Value:
    """A scalar: True when `bias` is zero everywhere."""
    magnitude = ir.node("Abs", [bias])
    largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0})
    zero = ir.Value(
        name=f"{bias.name}.zero",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([]),
        const_value=ir.tensor(0.0, dtype=ir.DataType.FLOAT),
    )
    graph.register_initializer(zero)
    equal = ir.node("Equal", [largest.outputs[0], zero])
    for node in (magnitude, largest, equal):
        node.outputs[0].type = ir.TensorType(ir.DataType.BOOL if node is equal else ir.DataType.FLOAT)
    graph.insert_before(place, [magnitude, largest, equal])
    return equal.outputs[0]


def _branch(node: ir.Node, inputs: int) -> ir.Graph:
    """A subgraph that is `node` with its first `inputs` inputs, taken from the surrounding graph."""
    copy = ir.node("MultiHeadAttention", node.inputs[:inputs], node.attributes, domain=MICROSOFT)
    copy.outputs[0].type = node.outputs[0].type
    copy.outputs[0].name = f"{node.outputs[0].name}.{inputs}"
    return ir.Graph([], [copy.outputs[0]], nodes=[copy], name=f"{node.outputs[0].name}.{inputs}.branch")
