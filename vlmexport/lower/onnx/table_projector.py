"""A projector that looks features up in the token embedding's own table, which is stored once."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.embedding import lower_embedding
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.progress import Progress
from vlmexport.split.parts import Role, Split
from vlmexport.split.vision import Projector


def shares_table(split: Split) -> bool:
    """Are the image features rows of the token embedding, for ids that the vision encoder gives?"""
    projector = split.parts[Role.PROJECTOR].module
    return isinstance(projector, Projector) and projector.wrapped is split.parts[Role.EMBEDDING].module


def write_table_projector(
    split: Split, opset: int, folder: Path, progress: Progress, table: ir.Model
) -> tuple[ir.Model, str]:
    """Write the projector, which refers to the data of the embedding graph `table` in the same folder.

    Returns its graph and file. It takes the ids of the encoder (any rank) and gives ``image_features`` ``[rows, H]``.
    """
    part = split.parts[Role.PROJECTOR]
    lowered = lower_embedding(split.parts[Role.EMBEDDING], opset, ir.DataType.FLOAT)
    graph = lowered.model.graph
    if len(graph.outputs) != 1 or len(part.signature.inputs) != 1:
        raise UnsupportedModelError("image features that are rows of an embedding with two tables have no form")
    given, rows = part.signature.inputs[0], graph.outputs[0]
    kinds = {"int32": ir.DataType.INT32, "int64": ir.DataType.INT64}
    ids = ir.Value(name=given.name, type=ir.TensorType(kinds[given.dtype]), shape=ir.Shape(given.dims))
    tape, after = Tape(), Tape()
    wide = tape.op("Cast", [ids], {"to": int(ir.DataType.INT64)})
    ir.convenience.replace_all_uses_with(graph.inputs[0], wide)
    graph.insert_before(graph[0], tape.nodes)
    hidden = part.signature.outputs[0].dims
    shape = ir.tensor([-1, int(hidden[1])], name="rows.shape")
    flat = after.op("Reshape", [rows, after.initializer(shape)])
    rows.name = "rows"
    flat.name, flat.type, flat.shape = "image_features", ir.TensorType(ir.DataType.FLOAT), ir.Shape(hidden)
    for value in after.initializers:
        graph.register_initializer(value)
    graph.extend(after.nodes)
    graph.inputs[0], graph.outputs[0], graph.name = ids, flat, str(Role.PROJECTOR)
    file = f"{Role.PROJECTOR}.onnx"
    written = table.graph.initializers
    stream_weights(lowered.model, lowered.groups, folder / file, progress, f"write {Role.PROJECTOR}", written)
    return lowered.model, file
