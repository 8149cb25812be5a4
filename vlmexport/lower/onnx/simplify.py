"""Clean a traced graph: fold constants, drop dead nodes and shuffles that undo each other."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.optimizer import optimize_ir


def simplify(model: ir.Model) -> None:
    """Simplify `model` in place. Weights must be graph inputs (not initializers), else small ones are folded."""
    optimize_ir(model)
    _cancel_transposes(model.graph)
    _register_constants(model.graph)
    RemoveUnusedNodesPass()(model)


def forget_trace(graph: ir.Graph) -> None:
    """Drop what the tracer noted about values: its shapes carry symbols that mean nothing to a reader of the file."""
    for node in graph:
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
        node.metadata_props.clear()
        node.doc_string = None


def _register_constants(graph: ir.Graph) -> None:
    """Give the graph the constants that rewriting left to their nodes alone (limits of a Clip), by own names."""
    for node in graph:
        for value in node.inputs:
            if value is None or value.producer() is not None or value.const_value is None or value.is_graph_input():
                continue
            if value.name is None or graph.initializers.get(value.name) is value:
                continue
            if value.name in graph.initializers:
                value.name = f"{value.name}.{node.outputs[0].name}"
            graph.initializers[str(value.name)] = value


def _cancel_transposes(graph: ir.Graph) -> None:
    """``Transpose(Transpose(x))`` with inverse permutations is x."""
    for node in graph:
        inner = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Transpose" or inner.inputs[0] is None:
            continue
        first, second = inner.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
        if [first[i] for i in second] == list(range(len(first))):
            ir.convenience.replace_all_uses_with(node.outputs[0], inner.inputs[0])


def share(model: ir.Model) -> None:
    """Compute once what several nodes have in common (the scaling of rows before q, k, v), and drop what is unused."""
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)


def split_gemms(graph: ir.Graph) -> None:
    """``Gemm(x, w, b)`` with w transposed, as a trace says a linear layer of rows, becomes ``MatMul`` and ``Add``."""
    for node in list(graph):
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if node.op_type != "Gemm" or not plain or node.attributes.get_int("transA") or len(node.inputs) < 3:
            continue
        x, weight, bias = node.inputs[:3]
        steps = [ir.node("Transpose", [weight], {"perm": [1, 0]})] if node.attributes.get_int("transB") else []
        steps.append(ir.node("MatMul", [x, steps[0].outputs[0] if steps else weight]))
        steps.append(ir.node("Add", [steps[-1].outputs[0], bias]))
        for step in steps:
            step.outputs[0].type = node.outputs[0].type
        graph.insert_before(node, steps)
        ir.convenience.replace_all_uses_with(node.outputs[0], steps[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
