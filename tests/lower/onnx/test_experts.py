"""Rows go to their experts and come back to their places; an expert without rows does not run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.experts import ExpertEmitter, ExpertRegion, without_regions
from vlmexport.lower.onnx.linear import dtype_of
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.versions import ir_version

EXPERTS, WIDTH = 4, 3
KINDS = {"fp32": (ir.DataType.FLOAT, np.float32), "fp16": (ir.DataType.FLOAT16, np.float16)}


def value(name: str, kind: ir.DataType, dims: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims))


def region(inputs: list[ir.Value]) -> ExpertRegion:
    first = ir.node("ExpertIn", inputs, {"experts": EXPERTS}, domain=DOMAIN)
    body = ir.node("Neg", [first.outputs[0]])
    body.outputs[0].shape = ir.Shape(["rows", WIDTH])
    last = ir.node("ExpertOut", [body.outputs[0], *inputs], domain=DOMAIN)
    other = ir.node("Abs", [inputs[0]])
    found = without_regions([first, other, body, last])
    assert found[0] is other
    made = found[1]
    assert isinstance(made, ExpertRegion)
    assert made.inside == (body,)
    return made


def times_its_number(tape: Tape, rows: ir.Value, expert: int) -> ir.Value:
    """An expert that multiplies by its number plus one, so that it shows who computed a row."""
    kind = dtype_of(rows)
    factor = tape.initializer(ir.tensor([float(expert + 1)], dtype=kind, name=f"factor.{expert}"))
    out = tape.op("Mul", [rows, factor])
    out.type = ir.TensorType(kind)
    return out


def run(inputs: list[ir.Value], given: dict[str, np.ndarray], *, break_idle: bool = False) -> np.ndarray:
    tape = Tape()

    def one(inner: Tape, rows: ir.Value, expert: int) -> ir.Value:
        if expert == EXPERTS - 1 and break_idle:  # fails when it runs, on any number of rows
            shape = inner.initializer(ir.tensor([7, 7, 7], name=f"broken.{expert}"))
            out = inner.op("Reshape", [rows, shape])
            out.type = ir.TensorType(dtype_of(rows))
            return out
        return times_its_number(inner, rows, expert)

    out = ExpertEmitter(tape, "layers.0.", region(inputs), one).emit(inputs[0], inputs[1:])
    out.name, out.shape = "out", ir.Shape(["tokens", WIDTH])
    graph = ir.Graph(
        inputs, [out], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="experts"
    )
    data = ir.to_proto(ir.Model(graph, ir_version=ir_version(21))).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, given)[0]
    return result


def routed(kind: str, chosen: np.ndarray, **more: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the graph gives, and what it should give."""
    onnx, numpy = KINDS[kind]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((len(chosen), WIDTH)).astype(numpy)
    weights = rng.random(chosen.shape).astype(np.float32)
    inputs = [
        value("rows", onnx, ["tokens", WIDTH]),
        value("chosen", ir.DataType.INT64, ["tokens", chosen.shape[1]]),
        value("weights", ir.DataType.FLOAT, ["tokens", chosen.shape[1]]),
    ]
    got = run(inputs, {"rows": rows, "chosen": chosen, "weights": weights}, **more)
    factors = (weights * (chosen + 1)).sum(axis=1, keepdims=True)
    return got, rows.astype(np.float64) * factors


@pytest.mark.parametrize(("kind", "limit"), [("fp32", 1e-6), ("fp16", 4e-3)])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_rows_are_weighted_sums_of_their_experts(kind: str, limit: float, tokens: int) -> None:
    chosen = np.random.default_rng(tokens).permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :2]
    got, wanted = routed(kind, chosen)
    assert got.dtype == KINDS[kind][1]
    assert np.abs(got - wanted).max() <= limit * np.abs(wanted).max()


def test_an_expert_without_rows_does_not_run() -> None:
    got, wanted = routed("fp32", np.array([[0, 1], [2, 0]]), break_idle=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    with pytest.raises(Exception, match="Reshape"):
        routed("fp32", np.array([[0, EXPERTS - 1]]), break_idle=True)


@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_of_all_experts_are_computed_where_they_are_not_zero(tokens: int) -> None:
    rng = np.random.default_rng(3)
    rows = np.zeros((EXPERTS, tokens, WIDTH), np.float32)
    chosen = rng.integers(0, EXPERTS - 1, tokens)
    rows[chosen, np.arange(tokens)] = rng.standard_normal((tokens, WIDTH))
    wanted = rows * (np.arange(EXPERTS) + 1)[:, None, None]
    flat = rows.reshape(-1, WIDTH)
    got = run([value("rows", ir.DataType.FLOAT, ["all", WIDTH])], {"rows": flat}, break_idle=True)
    np.testing.assert_allclose(got, wanted.reshape(-1, WIDTH), rtol=1e-6)


def test_a_row_that_is_not_a_number_is_not_taken_for_zero() -> None:
    rows = np.zeros((EXPERTS, WIDTH), np.float32)
    rows[1, 2] = np.nan
    got = run([value("rows", ir.DataType.FLOAT, ["all", WIDTH])], {"rows": rows})
    assert np.isnan(got[1, 2])
    assert (got[[0, 2, 3]] == 0).all()
