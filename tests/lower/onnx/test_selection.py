"""Selections of rows: those that drop padding become all rows, every other one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.selection import keep_every_row
from vlmexport.manifest import TensorSpec
from vlmexport.split.parts import Part, Role, Signature


class Encoder(nn.Module):
    """Doubles the pictures ``[1, n, 4]`` that `chosen` takes."""

    def __init__(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return 2 * pixel_values[self.chosen(pixel_values)]


def not_zero(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels != 0).any(dim=-1)


def bright(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean(dim=-1) > 0.5


def dull(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean(dim=-1) < 1e6


def part(chosen: Callable[[torch.Tensor], torch.Tensor], rows: str = "n") -> Part:
    signature = Signature(
        (TensorSpec("pixel_values", "float32", (1, "n", 4)),), (TensorSpec("y", "float32", (rows, 4)),)
    )
    example = {"pixel_values": torch.arange(12.0).reshape(1, 3, 4) + 0.1}
    return Part(Role.VISION_ENCODER, Encoder(chosen), "", signature, (example,))


def selection(*, transposed: bool = True, counted: bool = False) -> ir.Model:
    """``y = 2 * x[x.sum(-1) != 0]`` for x ``[1, n, 4]``, as a trace says it; `counted` also reads how many rows."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "n", 4]))
    zero, two = (
        ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape([]), const_value=ir.tensor(v, dtype=t))
        for n, v, t in (("zero", 0.0, ir.DataType.FLOAT), ("two", 2.0, ir.DataType.FLOAT))
    )
    axes = ir.Value(
        name="axes", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]), const_value=ir.tensor([-1])
    )
    total = ir.node("ReduceSum", [x, axes], {"keepdims": 0})
    equal = ir.node("Equal", [total.outputs[0], zero])
    mask = ir.node("Not", [equal.outputs[0]])
    found = ir.node("NonZero", [mask.outputs[0]], name="find_rows")
    indices = ir.node("Transpose", [found.outputs[0]], {"perm": [1, 0]})
    rows = ir.node("GatherND", [x, (indices if transposed else found).outputs[0]])
    double = ir.node("Mul", [rows.outputs[0], two])
    outputs, nodes = [double.outputs[0]], [total, equal, mask, found, indices, rows, double]
    if counted:
        count = ir.node("ReduceMax", [found.outputs[0]], name="count_rows")
        outputs.append(count.outputs[0])
        nodes.append(count)
    for place, node in enumerate(nodes):
        node.outputs[0].name = f"v{place}"
    double.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[zero, two, axes], opset_imports={"": 24}, name="g")
    model = ir.Model(graph, ir_version=10)
    ShapeInferencePass()(model)
    return model


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, inputs)[0]


def test_all_rows_are_kept_and_the_selected_axes_are_one() -> None:
    model = selection()
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    x[0, 0] = 0
    assert run(model, x=x).shape == (1, 4)
    keep_every_row(model, part(not_zero))
    assert "NonZero" not in {node.op_type for node in model.graph}
    assert np.array_equal(run(model, x=x), 2 * x.reshape(2, 4))


def test_a_graph_that_selects_nothing_is_left_alone() -> None:
    model = selection()
    keep_every_row(model, part(not_zero))
    before = [node.op_type for node in model.graph]
    keep_every_row(model, part(bright))
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [({"counted": True}, "find_rows .NonZero.*count_rows"), ({"transposed": False}, "find_rows .NonZero")],
)
def test_what_else_reads_a_selection_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        keep_every_row(selection(**change), part(not_zero))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (part(lambda x: x.mean(dim=-1) > 3), "ordinary picture"),
        (part(not_zero, rows="kept"), "ordinary picture"),
        (part(dull), "not by leaving out rows of zeros"),
    ],
)
def test_a_selection_of_other_rows_than_padding_is_refused(given: Part, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        keep_every_row(selection(), given)
