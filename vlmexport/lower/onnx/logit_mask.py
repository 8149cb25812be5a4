"""Tokens that the model never writes, in the decoder graph: their logits are a constant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.split.logits import HiddenTokens


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
