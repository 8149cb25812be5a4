"""The token embedding as a graph: one lookup in an FP16 table."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.linear import checked_cast
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.split.parts import Part

_PROBE_LIMIT = 1e-6


@dataclass(frozen=True)
class EmbeddingGraph:
    """The graph without its table, and the group that makes the table."""

    model: ir.Model
    groups: tuple[WeightGroup, ...]


def lower_embedding(part: Part, opset: int, float_type: ir.DataType) -> EmbeddingGraph:
    """``input_ids`` int64 ``[B, S]`` to ``inputs_embeds`` ``[B, S, H]`` of `float_type`; the table is stored FP16.

    Raises `UnsupportedModelError` when the module does more than look up a row and scale it.
    """
    table = _table(part)
    scale = _lookup_scale(part, table)
    name = f"{part.prefix}weight"
    weight = initializer(name, ir.DataType.FLOAT16, table.shape)
    ids = ir.Value(
        name="input_ids",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(["batch_size", "sequence_length"]),
    )
    tape = Tape()
    rows = tape.op("Gather", [weight, ids], {"axis": 0})
    if scale != 1.0:
        wide = tape.op("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
        factor = tape.initializer(ir.tensor(scale, dtype=ir.DataType.FLOAT, name="embedding.scale"))
        rows = tape.op("Mul", [wide, factor])
    if scale != 1.0 or float_type != ir.DataType.FLOAT16:
        rows = tape.op("Cast", [rows], {"to": int(float_type)})
    rows.name, rows.type = "inputs_embeds", ir.TensorType(float_type)
    rows.shape = ir.Shape(["batch_size", "sequence_length", table.shape[1]])
    graph = ir.Graph(
        [ids], [rows], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": opset}, name="embed_tokens"
    )
    model = ir.Model(graph, ir_version=ir_version(opset), producer_name="vlmexport")
    return EmbeddingGraph(model, (WeightGroup((weight,), lambda: (checked_cast(name, table, ir.DataType.FLOAT16),)),))


def _table(part: Part) -> torch.Tensor:
    parameters = dict(part.module.named_parameters())
    if not isinstance(part.module, nn.Embedding) or set(parameters) != {"weight"}:
        raise UnsupportedModelError(f"the token embedding is a {type(part.module).__name__}, not a table of rows")
    return parameters["weight"].detach()


def _lookup_scale(part: Part, table: torch.Tensor) -> float:
    """The factor between the module's output and its table's rows (1.0 for most families)."""
    ids = torch.arange(min(64, table.shape[0])).unsqueeze(0)
    with torch.no_grad():
        got, rows = part.module(ids)[0].float(), table[ids[0]].float()
    place = rows.abs().argmax()
    scale = float(got.flatten()[place] / rows.flatten()[place])
    if abs(scale - 1.0) < _PROBE_LIMIT:
        scale = 1.0
    tolerance = float(torch.finfo(table.dtype).eps) * float(got.abs().max()) if scale != 1.0 else 0.0
    if not (got - scale * rows).abs().max() <= tolerance:
        raise UnsupportedModelError("the token embedding does more than look up a row and scale it")
    return scale
