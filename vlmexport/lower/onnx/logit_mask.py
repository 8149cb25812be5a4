"""What the model does to the logits of its head, in the decoder graph: it scales them, and hides tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.split.logits import HiddenTokens, LogitScale


def scale_logits(model: ir.Model, scale: LogitScale | None) -> None:
    """Let the graph's output ``logits`` be scaled; nothing changes for None."""
    if scale is None:
        return
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    factor = ir.Value(
        name="logits.scale", type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(np.float32(scale.factor))
    )
    graph.register_initializer(factor)
    tape = Tape()
    made = tape.op("Div" if scale.divides else "Mul", [logits, factor])
    logits.name, made.name, made.type, made.shape = "logits.head", "logits", logits.type, logits.shape
    graph.extend(tape.nodes)
    graph.outputs[list(graph.outputs).index(logits)] = made


def hide_tokens(model: ir.Model, hidden: HiddenTokens | None) -> None:
    """Let the graph's output ``logits`` have ``hidden.value`` for the hidden tokens; nothing changes for None."""
    if hidden is None:
        return
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    shape = logits.shape
    if shape is None or not isinstance(shape[2], int):
        raise ValueError("the decoder's logits have no vocabulary size")
    mask = np.zeros(shape[2], dtype=np.bool_)
    mask[list(hidden.ids)] = True
    tape = Tape()
    names = ir.Value(name="logits.hidden", type=ir.TensorType(ir.DataType.BOOL), const_value=ir.tensor(mask))
    lowest = ir.Value(
        name="logits.lowest", type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(np.float32(hidden.value))
    )
    for constant in (names, lowest):
        graph.register_initializer(constant)
    made = tape.op("Where", [names, lowest, logits])
    logits.name, made.name, made.type, made.shape = "logits.all", "logits", logits.type, shape
    graph.extend(tape.nodes)
    graph.outputs[list(graph.outputs).index(logits)] = made
