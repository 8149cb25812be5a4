"""A decoder graph that gives embeddings of whole prompts: no cache, every position, normed and masked."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.traced_values import required

_PAST, _KEEP = "past_key_values.", "num_logits_to_keep"


def embeddings_only(model: ir.Model) -> None:
    """Turn the graph's ``logits`` (of the embedding layer) into ``embeddings`` float32 ``[B, S, width]``.

    The cache's inputs become empty tensors of the graph, its outputs and the choice of positions go away.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    tape = Tape()
    batch = tape.op("Shape", [inputs["inputs_embeds"]], {"start": 0, "end": 1})
    gone = [value for name, value in inputs.items() if name.startswith(_PAST) or name == _KEEP]
    for value in gone:
        made = _zero(tape) if value.name == _KEEP else _empty(tape, value, batch)
        ir.convenience.replace_all_uses_with(value, made)
        graph.inputs.remove(value)
    graph.insert_before(graph[0], tape.nodes)
    logits = next(value for value in graph.outputs if value.name == "logits")
    after = Tape()
    out = _normed(after, logits, inputs["attention_mask"])
    out.shape = ir.Shape(["batch_size", "sequence_length", required(logits.shape)[2]])
    graph.extend(after.nodes)
    for value in (*tape.initializers, *after.initializers):
        graph.register_initializer(value)
    logits.name = "logits.raw"
    graph.outputs.clear()
    graph.outputs.append(out)
    RemoveUnusedNodesPass()(model)


def _zero(tape: Tape) -> ir.Value:
    return tape.initializer(ir.tensor(np.int64(0), name="all_positions"))


def _empty(tape: Tape, past: ir.Value, batch: ir.Value) -> ir.Value:
    """A tensor of the type of `past` ``[B, heads, T, D]`` without tokens."""
    dims, dtype = required(past.shape), required(past.dtype)
    rest = tape.initializer(ir.tensor(np.array([dims[1], 0, dims[3]], np.int64), name=f"{past.name}.rest"))
    shape = tape.op("Concat", [batch, rest], {"axis": 0})
    fill = ir.tensor(np.zeros(1, dtype.numpy()), name=f"{past.name}.fill")
    made = tape.op("ConstantOfShape", [shape], {"value": fill})
    made.type, made.shape = past.type, ir.Shape([dims[0], dims[1], 0, dims[3]])
    return made


def _normed(tape: Tape, rows: ir.Value, mask: ir.Value) -> ir.Value:
    axis = tape.initializer(ir.tensor(np.array([-1], np.int64), name="embeddings.axis"))
    length = tape.op("ReduceL2", [rows, axis], {"keepdims": 1})
    unit = tape.op("Div", [rows, length])
    valid = tape.op("Cast", [tape.op("Unsqueeze", [mask, axis])], {"to": int(ir.DataType.FLOAT)})
    out = tape.op("Mul", [unit, valid])
    out.name, out.type = "embeddings", ir.TensorType(ir.DataType.FLOAT)
    return out
