from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from vlmexport.lower.onnx.simplify import split_gemms


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, inputs)[0]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_becomes_a_product_and_a_sum(transposed: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 4), "w": (5, 4) if transposed else (4, 5), "b": (5,)}
    values = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s)) for n, s in shapes.items()]
    node = ir.node("Gemm", values, {"transB": transposed, "alpha": 1.0, "beta": 1.0})
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=10)
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    expected = run(model, **inputs)
    split_gemms(model.graph)
    assert [n.op_type for n in model.graph if n.op_type != "Transpose"] == ["MatMul", "Add"]
    assert np.allclose(run(model, **inputs), expected, atol=1e-6)


def test_a_scaled_gemm_is_left_alone() -> None:
    values = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 4])) for n in "xwb"]
    node = ir.node("Gemm", values, {"alpha": 0.5})
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    split_gemms(graph)
    assert [n.op_type for n in graph] == ["Gemm"]
