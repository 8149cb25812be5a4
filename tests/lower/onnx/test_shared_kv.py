"""Attention over another layer's cache: GroupQueryAttention without new keys gives what a plain sum over them gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.shared_kv import SharedCall, no_keys, over_cache

Array = NDArray[Any]
HEADS, KV_HEADS, DIM, CAPACITY = 4, 2, 16, 10


def _value(name: str, dims: list[Any], kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims))


def _session(tape: Tape, inputs: list[ir.Value], output: ir.Value, opset: int) -> ort.InferenceSession:
    output.name, output.type = "out", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": opset, "com.microsoft": 1}
    graph = ir.Graph(
        inputs, [output], nodes=tape.nodes, initializers=tape.initializers, opset_imports=imports, name="g"
    )
    return ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def _wanted(query: Array, key: Array, value: Array, seen: Array, softcap: float) -> Array:
    """``[B, S, heads * D]``, step by step; `seen` is ``[B, S, T]``."""
    total = seen.shape[2]
    key, value = (np.repeat(t[:, :, :total], HEADS // KV_HEADS, axis=1) for t in (key, value))
    scores = np.einsum("bnsd,bntd->bnst", query, key)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bnst,bntd->bsnd", weights, value)
    return out.reshape(*out.shape[:2], HEADS * DIM)


def _case(lengths: list[int], tokens: int, window: int) -> tuple[dict[str, Array], Array, Array]:
    """Inputs, which key each query sees ``[B, S, T]``, and which queries are no padding ``[B, S]``."""
    rng = np.random.default_rng(0)
    rows, total = np.array(lengths), max(lengths)
    given = {
        "query": rng.standard_normal((len(rows), HEADS, tokens, DIM)).astype(np.float32) / 4,
        "key": rng.standard_normal((len(rows), KV_HEADS, CAPACITY, DIM)).astype(np.float32),
        "value": rng.standard_normal((len(rows), KV_HEADS, CAPACITY, DIM)).astype(np.float32),
        "last": (rows - 1).astype(np.int32),
        "total": np.array(total, np.int32),
    }
    slots = np.maximum(rows - tokens, 0)[:, None] + np.arange(tokens)
    real = slots < rows[:, None]
    slots = np.minimum(slots, rows[:, None] - 1)[:, :, None]
    keys = np.arange(total)
    return given, (keys <= slots) & ((keys > slots - window) | (window < 0)), real


# A decode step of rows of different length, a padded prompt, and a chunk behind a past; buffers are longer than all.
@pytest.mark.parametrize(("lengths", "tokens"), [([6, 4], 1), ([6, 4], 6), ([7], 3)])
@pytest.mark.parametrize(("window", "softcap"), [(-1, 0.0), (3, 0.0), (3, 2.0)])
def test_the_cache_of_another_layer_is_attended_to_as_one_of_its_own(
    lengths: list[int], tokens: int, window: int, softcap: float
) -> None:
    given, seen, real = _case(lengths, tokens, window)
    wanted = _wanted(given["query"], given["key"], given["value"], seen, softcap)
    found = _grouped(window, softcap, len(lengths), tokens).run(None, given)[0]
    np.testing.assert_allclose(found[real], wanted[real], atol=2e-6)
    other = _grouped(window, softcap, len(lengths), tokens).run(None, given | {"key": given["key"] * 1.1})[0]
    assert np.abs(other - wanted)[real].max() > 1e-3
    cut = {n: given[n][:, :, : seen.shape[2]] if n != "query" else given[n] for n in ("query", "key", "value")}
    standard = _standard(softcap).run(None, cut | {"mask": seen[:, None]})[0]
    np.testing.assert_allclose(standard[real], wanted[real], atol=2e-6)


def _grouped(window: int, softcap: float, batch: int, tokens: int) -> ort.InferenceSession:
    """The node as `OrtDialect` writes it, on queries ``[B, heads, S, D]``."""
    tape = Tape()
    query = _value("query", [batch, HEADS, tokens, DIM])
    key, value = (_value(name, [batch, KV_HEADS, CAPACITY, DIM]) for name in ("key", "value"))
    last, total = _value("last", [batch], ir.DataType.INT32), _value("total", [], ir.DataType.INT32)
    none = no_keys(tape, query, KV_HEADS * DIM)
    shape = tape.initializer(ir.tensor([0, 0, HEADS * DIM], name="flat"))
    flat = tape.op("Reshape", [tape.op("Transpose", [query], {"perm": [0, 2, 1, 3]}), shape])
    sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 1.0}
    out = tape.op(
        "GroupQueryAttention",
        [flat, none, none, key, value, last, total],
        {**sizes, "local_window_size": window, "softcap": softcap},
        domain="com.microsoft",
    )
    return _session(tape, [query, key, value, last, total], out, 21)


def _standard(softcap: float) -> ort.InferenceSession:
    tape = Tape()
    query = _value("query", ["b", HEADS, "s", DIM])
    key, value = (_value(name, ["b", KV_HEADS, "t", DIM]) for name in ("key", "value"))
    mask = _value("mask", ["b", 1, "s", "t"], ir.DataType.BOOL)
    call = SharedCall(query, key, value, HEADS, KV_HEADS, DIM, 1.0, softcap, -1, 0)
    return _session(tape, [query, key, value, mask], over_cache(tape, call, mask), 23)
