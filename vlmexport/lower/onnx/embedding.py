"""The token embedding as a graph: a lookup in an FP16 table, and in a second one where each layer gets a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.linear import checked_cast
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.model.per_token import PER_LAYER
from vlmexport.split.parts import Part
from vlmexport.split.per_layer import TokenTables

_PROBE_LIMIT = 1e-6
_IDS_AT_ONCE = 8192
_TOKENS = ("batch_size", "sequence_length")


@dataclass(frozen=True)
class EmbeddingGraph:
    """The graph without its tables, and the groups that make them."""

    model: ir.Model
    groups: tuple[WeightGroup, ...]


def lower_embedding(part: Part, opset: int, float_type: ir.DataType) -> EmbeddingGraph:
    """``input_ids`` int64 ``[B, S]`` to ``inputs_embeds`` ``[B, S, H]`` of `float_type`; tables are stored FP16.

    For `TokenTables` also to ``per_layer_inputs`` ``[B, S, layers, width]``. The table of a module that does more than
    look up a row and scale it has what it gives for each token. Raises `UnsupportedModelError` when that depends on the
    other tokens.
    """
    ids = ir.Value(
        name="input_ids",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(_TOKENS),
    )
    tape = Tape()
    module, outputs, groups = part.module, list[ir.Value](), list[WeightGroup]()
    first = module.embedding if isinstance(module, TokenTables) else module
    rows, group = _lookup(tape, first, f"{part.prefix}weight", ids, "embedding", float_type)
    rows.name, rows.shape = "inputs_embeds", ir.Shape([*_TOKENS, _table(first).shape[1]])
    outputs.append(rows)
    groups.append(group)
    if isinstance(module, TokenTables):
        rows, group = _lookup(
            tape, module.rows, f"{module.rows_path}.weight", _looked_up(tape, ids, module), "rows", float_type
        )
        shape = tape.initializer(ir.tensor([0, 0, *module.shape], name="rows.shape"))
        rows = tape.op("Reshape", [rows, shape])
        rows.name, rows.type = PER_LAYER, ir.TensorType(float_type)
        rows.shape = ir.Shape([*_TOKENS, *module.shape])
        outputs.append(rows)
        groups.append(group)
    graph = ir.Graph(
        [ids], outputs, nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": opset}, name="embed_tokens"
    )
    model = ir.Model(graph, ir_version=ir_version(opset), producer_name="vlmexport")
    return EmbeddingGraph(model, tuple(groups))


def _lookup(
    tape: Tape, module: Any, name: str, ids: ir.Value, what: str, float_type: ir.DataType
) -> tuple[ir.Value, WeightGroup]:
    """Scaled rows of `module`'s table, whose name is `name`, for `ids`; and the group that makes the table."""
    table = _table(module)
    scale = _lookup_scale(module, table)
    weight = initializer(name, ir.DataType.FLOAT16, table.shape)
    made = _looked_up_before(module, table) if scale is None else lambda: table
    scale = 1.0 if scale is None else scale
    rows = tape.op("Gather", [weight, ids], {"axis": 0})
    if scale != 1.0:
        wide = tape.op("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
        factor = tape.initializer(ir.tensor(scale, dtype=ir.DataType.FLOAT, name=f"{what}.scale"))
        rows = tape.op("Mul", [wide, factor])
    if scale != 1.0 or float_type != ir.DataType.FLOAT16:
        rows = tape.op("Cast", [rows], {"to": int(float_type)})
    rows.type = ir.TensorType(float_type)
    return rows, WeightGroup((weight,), lambda: (checked_cast(name, made(), ir.DataType.FLOAT16),))


def _looked_up(tape: Tape, ids: ir.Value, module: TokenTables) -> ir.Value:
    """The ids whose rows the tokens `ids` have: the stand-in's for those without a row of their own."""
    count = tape.initializer(ir.tensor(_table(module.rows).shape[0], dtype=ir.DataType.INT64, name="rows.count"))
    stand_in = tape.initializer(ir.tensor(module.stand_in, dtype=ir.DataType.INT64, name="rows.stand_in"))
    other = tape.op("GreaterOrEqual", [ids, count])
    for token in module.replaced:
        one = tape.initializer(ir.tensor(token, dtype=ir.DataType.INT64, name=f"rows.token.{token}"))
        other = tape.op("Or", [other, tape.op("Equal", [ids, one])])
    return tape.op("Where", [other, stand_in, ids])


def _table(module: nn.Module) -> torch.Tensor:
    parameters = dict(module.named_parameters())
    if not isinstance(module, nn.Embedding) or set(parameters) != {"weight"}:
        raise UnsupportedModelError(f"the token embedding is a {type(module).__name__}, not a table of rows")
    return parameters["weight"].detach()


def _looked_up_before(module: nn.Module, table: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What makes the rows that `module` gives for every token, each by itself, in the type of `table`.

    Raises `UnsupportedModelError` for a module whose rows depend on the tokens beside them.
    """
    ids = torch.arange(min(64, table.shape[0]))
    with torch.no_grad():
        one, other = module(ids[None])[0].float(), module(ids.flip(0)[:, None])[:, 0].float().flip(0)
    if not (one - other).abs().max() <= _PROBE_LIMIT * one.abs().max():
        raise UnsupportedModelError("what the token embedding gives for a token depends on the tokens beside it")

    def rows() -> torch.Tensor:
        made = torch.empty_like(table)
        with torch.no_grad():
            for start in range(0, len(table), _IDS_AT_ONCE):
                part = torch.arange(start, min(start + _IDS_AT_ONCE, len(table)))
                made[part] = module(part[None])[0].to(made.dtype)
        return made

    return rows


def _lookup_scale(module: nn.Module, table: torch.Tensor) -> float | None:
    """The factor between the module's output and its table's rows (1.0 for most families); None where it does more."""
    ids = torch.arange(min(64, table.shape[0])).unsqueeze(0)
    with torch.no_grad():
        got, rows = module(ids)[0].float(), table[ids[0]].float()
    place = rows.abs().argmax()
    scale = float(got.flatten()[place] / rows.flatten()[place])
    if abs(scale - 1.0) < _PROBE_LIMIT:
        scale = 1.0
    tolerance = float(torch.finfo(table.dtype).eps) * float(got.abs().max()) if scale != 1.0 else 0.0
    if not (got - scale * rows).abs().max() <= tolerance:
        return None
    return scale
