"""The decoder of the ``transformersjs`` layout: what the client does not feed is made inside the graph."""

from __future__ import annotations

import onnx_ir as ir

_BLOCKS, _POSITIONS = "block_ids", "position_ids"


def as_client_decodes(graph: ir.Graph) -> tuple[str, ...]:
    """Make ``block_ids`` of a decoder whose prompt is one block, and mend ``position_ids``; both where there are any.

    Returns the names of the inputs that are no longer there.
    """
    named = {str(value.name): value for value in graph.inputs}
    if _POSITIONS in named:
        _limit_positions(graph, named)
    if _BLOCKS not in named:
        return ()
    _make_blocks(graph, named)
    return (_BLOCKS,)


def _limit_positions(graph: ir.Graph, named: dict[str, ir.Value]) -> None:
    """Let no position be beyond the last token's number.

    A picture has as many tokens as positions or more, so none is. But for prompts without pictures the client counts
    the prompt three times over when it goes on with the answer.
    """
    positions, uses = named[_POSITIONS], tuple(named[_POSITIONS].uses())
    one = _constant(graph, f"{_POSITIONS}.1", 1)
    total = ir.node("Shape", [named["attention_mask"]], {"start": 1, "end": 2})
    last = ir.node("Sub", [total.outputs[0], one])
    limited = ir.node("Min", [positions, last.outputs[0]])
    steps = [total, last, limited]
    for index, step in enumerate(steps):
        step.outputs[0].name, step.outputs[0].dtype = f"{_POSITIONS}.limited.{index}", ir.DataType.INT64
    limited.outputs[0].shape = positions.shape
    graph.insert_before(graph[0], steps)
    for node, index in uses:
        node.replace_input_with(index, limited.outputs[0])


def _make_blocks(graph: ir.Graph, named: dict[str, ir.Value]) -> None:
    """``block_ids``: 1 for the first call's tokens, 0 for later ones."""
    blocks = named[_BLOCKS]
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


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
    graph.register_initializer(value)
    return value
