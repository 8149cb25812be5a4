"""The embedding and decoder graphs of the ``genai`` layout: the merge is in the graph, every position gives logits."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.embedding import EmbeddingGraph

FEATURES, KEEP = "image_features", "num_logits_to_keep"
_INT64 = ir.DataType.INT64


def with_merge(table: EmbeddingGraph, image_token_id: int) -> EmbeddingGraph:
    """``input_ids`` ``[B, S]`` and ``image_features`` ``[image_tokens, hidden]`` to ``inputs_embeds``, in place.

    The feature rows take the places of the tokens `image_token_id`, in order; there must be one for each, or none at
    all: without rows every token keeps its own embedding, as in the steps of an answer.
    """
    graph = table.model.graph
    (ids,), (out,) = list(graph.inputs), list(graph.outputs)
    if out.dtype is None or out.shape is None:
        raise ValueError("the embedding graph has no type")
    hidden = out.shape[-1]
    rows = ir.Value(name=FEATURES, type=ir.TensorType(out.dtype), shape=ir.Shape(["image_tokens", hidden]))
    out.name, shape = "token_embeds", out.shape
    tape = Tape()
    token = tape.initializer(ir.tensor(image_token_id, dtype=_INT64, name="merge.image_token"))
    none = tape.initializer(ir.tensor([0], dtype=_INT64, name="merge.zero"))
    is_image = tape.op("Equal", [ids, token])
    places = tape.op("Transpose", [tape.op("NonZero", [is_image])], {"perm": [1, 0]})
    given = tape.op("Shape", [rows], {"start": 0, "end": 1})
    found = tape.op("Shape", [places], {"start": 0, "end": 1})
    # More or fewer rows than image tokens are an error of ScatterND; no rows at all are a text.
    count = tape.op("Where", [tape.op("Equal", [given, none]), none, found])
    taken = tape.op("Slice", [places, none, count, none])
    merged = tape.op("ScatterND", [out, taken, rows])
    merged.name, merged.type, merged.shape = "inputs_embeds", ir.TensorType(out.dtype), shape
    graph.inputs.append(rows)
    graph.extend(tape.nodes)
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.outputs[0] = merged
    return table


def keep_every_logit(graph: ir.Graph) -> tuple[str, ...]:
    """Make ``num_logits_to_keep`` of a decoder graph a constant: the runtime does not feed it, and reads all logits.

    Returns the names of the inputs that were made so.
    """
    asked = [value for value in graph.inputs if value.name == KEEP]
    for value in asked:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(0, dtype=_INT64, name=KEEP)
        graph.register_initializer(value)
    return tuple(str(value.name) for value in asked)
