"""Judged by ONNX's own reference: ONNX Runtime's CPU computes FP16 products in FP32, so it cannot show an overflow."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from vlmexport.lower.onnx.precision import half_products, widen

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def product_model(weight: np.ndarray, *, safe: bool) -> ir.Model:
    """``y = x @ weight`` with the weight stored FP16: by `half_products`, or by casting the activation naively."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["rows", weight.shape[0]]))
    wide = ir.Value(name="wide", type=ir.TensorType(FLOAT), shape=ir.Shape(weight.shape))
    tensor = ir.tensor(weight.astype(np.float16), name="w")
    stored = ir.Value(name="w", type=ir.TensorType(HALF), shape=ir.Shape(weight.shape), const_value=tensor)
    node = ir.node("MatMul", [x, wide])
    out = node.outputs[0]
    out.name, out.type = "y", ir.TensorType(FLOAT)
    graph = ir.Graph([x], [out], nodes=[node], initializers=[stored], opset_imports={"": 21}, name="product")
    widen(wide, stored, graph)
    if safe:
        assert half_products(graph, {stored}) == 1
    else:
        cast = ir.node("Cast", [x], {"to": int(HALF)})
        graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])
        node.replace_input_with(1, stored)
        out.type = ir.TensorType(HALF)
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"x": x})[0].astype(np.float32)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e6, 1e30])
def test_products_are_right_at_any_magnitude(magnitude: float) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=(5, 32)).astype(np.float32)
    expected = x @ weight.astype(np.float16).astype(np.float32) * np.float32(magnitude)
    got = run(product_model(weight, safe=True), x * np.float32(magnitude))
    assert np.abs(got - expected).max() <= 5e-3 * np.abs(expected).max()


def test_rows_of_very_different_size_keep_their_precision() -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=(2, 32)).astype(np.float32)
    x *= np.array([[1e-6], [1e7]], dtype=np.float32)
    expected = x @ weight
    got = run(product_model(weight, safe=True), x)
    assert (np.abs(got - expected).max(axis=1) <= 5e-3 * np.abs(expected).max(axis=1)).all()


def test_rows_of_zeros_stay_zero() -> None:
    got = run(product_model(np.ones((4, 2), dtype=np.float32), safe=True), np.zeros((1, 4), dtype=np.float32))
    assert np.array_equal(got, np.zeros((1, 2)))


def test_a_naive_fp16_product_overflows_here() -> None:
    x = np.full((1, 4), 1e6, dtype=np.float32)
    assert not np.isfinite(run(product_model(np.ones((4, 2), dtype=np.float32), safe=False), x)).any()
