"""The decoder of the ``transformersjs`` layout: inputs that the client does not feed are made inside the graph."""

from __future__ import annotations

import onnx_ir as ir

_BLOCKS = "block_ids"


def as_client_decodes(graph: ir.Graph) -> tuple[str, ...]:
    """Make ``block_ids`` of a decoder whose prompt is one block: 1 for the first call's tokens, 0 for later ones.

    Returns the names of the inputs that were made so.
    """
    blocks = next((value for value in graph.inputs if value.name == _BLOCKS), None)
    if blocks is None:
        return ()
    named = {value.name: value for value in graph.inputs}
    one, zero = (_constant(graph, f"{_BLOCKS}.{n}", n) for n in (1, 0))
    sizes = ir.node("Shape", [named["inputs_embeds"]], {"start": 0, "end": 2})
    length = ir.node("Shape", [named["inputs_embeds"]], {"start": 1, "end": 2})
    total = ir.node("Shape", [named["attention_mask"]], {"start": 1, "end": 2})
    first = ir.node("Equal", [length.outputs[0], total.outputs[0]])
    number = ir.node("Where", [first.outputs[0], one, zero])
    spread = ir.node("Expand", [number.outputs[0], sizes.outputs[0]])
    steps = [sizes, length, total, first, number, spread]
    for index, step in enumerate(steps):
        step.outputs[0].name = f"{_BLOCKS}.made.{index}"
        step.outputs[0].dtype = ir.DataType.BOOL if step is first else ir.DataType.INT64
    graph.insert_before(graph[0], steps)
    ir.convenience.replace_all_uses_with(blocks, spread.outputs[0])
    graph.inputs.remove(blocks)
    return (_BLOCKS,)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
    graph.register_initializer(value)
    return value
