"""Each dialect operator against its formula in PyTorch, in ONNX Runtime, in FP32 and FP16."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.dialect import AttentionCall, Dialect
from vlmexport.lower.onnx.dialects.ort import OrtDialect
from vlmexport.lower.onnx.dialects.standard import StandardDialect
from vlmexport.lower.onnx.linear import LinearEmitter
from vlmexport.lower.onnx.rotary import Rotary, rotate
from vlmexport.plan import ExportPlan, OnnxOptions
from vlmexport.quantize.weights import DecoderWeights

HEADS, KV, DIM, HIDDEN = 4, 2, 32, 128
LIMITS = {ir.DataType.FLOAT: 2e-6, ir.DataType.FLOAT16: 4e-3}
CASES = list(itertools.product(LIMITS, (False, True), (-1, 3), (0.0, 5.0)))


def tables(interleaved: bool) -> Rotary:
    angles = torch.arange(16)[:, None] * (10000.0 ** (-torch.arange(0, DIM, 2) / DIM))
    return Rotary(angles.cos(), angles.sin(), interleaved, "")


def emitter(kind: ir.DataType) -> LinearEmitter:
    return LinearEmitter(DecoderWeights({}), ExportPlan("none", OnnxOptions(), "fp16", "fp32", ()), kind, 0)


def typed(name: str, kind: ir.DataType, dims: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims))


def session(tape: Tape, inputs: list[ir.Value], outputs: list[ir.Value], linears: LinearEmitter, opset: int) -> Any:
    weights = []
    for group in linears.groups:
        for value, array in zip(group.values, group.produce(), strict=True):
            value.const_value = ir.Tensor(array, name=value.name)
            weights.append(value)
    for index, value in enumerate(outputs):
        value.name = f"out{index}"
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=tape.nodes,
        initializers=[*tape.initializers, *weights],
        opset_imports={"": opset, "com.microsoft": 1},
        name="operator",
    )
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, softcap: float) -> torch.Tensor:
    """Causal attention of the last queries over all keys: ``[B, N, S, D]`` in, ``[B, S, N * D]`` out, in float64."""
    k, v = (t.double().repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * DIM**-0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    length, total = scores.shape[-2:]
    query, key = torch.arange(length)[:, None] + total - length, torch.arange(total)[None]
    seen = (key <= query) & (key > query - window) if window > 0 else key <= query
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def attention_graph(dialect: Dialect, kind: ir.DataType, linears: LinearEmitter, window: int, softcap: float) -> Any:
    tape = Tape()
    heads = {"q": HEADS, "k": KV, "v": KV}
    qkv = {n: typed(n, kind, ["batch_size", h, "sequence_length", DIM]) for n, h in heads.items()}
    past = {n: typed(n, kind, ["batch_size", KV, "past_sequence_length", DIM]) for n in ("past_key", "past_value")}
    shared = {
        "inputs_embeds": typed("inputs_embeds", kind, ["batch_size", "sequence_length", HIDDEN]),
        "attention_mask": typed("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]),
    }
    dialect.prologue(tape, shared, past["past_key"])
    call = AttentionCall(qkv["q"], qkv["k"], qkv["v"], None, HEADS, KV, DIM, DIM**-0.5, softcap, window, *past.values())
    out = dialect.attention(tape, call)
    outputs = [out.output, out.present_key, out.present_value]
    return session(tape, [*qkv.values(), *past.values(), *shared.values()], outputs, linears, dialect.opset)


def feed_of(kind: ir.DataType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int) -> dict[str, np.ndarray]:
    length = q.shape[2]
    tensors = {
        "q": q,
        "k": k[:, :, past:],
        "v": v[:, :, past:],
        "past_key": k[:, :, :past],
        "past_value": v[:, :, :past],
    }
    feed = {n: t.numpy().astype(kind.numpy()) for n, t in tensors.items()}
    feed["inputs_embeds"] = np.zeros((1, length, HIDDEN), kind.numpy())
    feed["attention_mask"] = np.ones((1, past + length), np.int64)
    return feed


@pytest.mark.parametrize(("kind", "interleaved", "window", "softcap"), CASES)
def test_group_query_attention_rotates_masks_and_caps(
    kind: ir.DataType, interleaved: bool, window: int, softcap: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    rotary, linears = tables(interleaved), emitter(kind)
    graph = attention_graph(OrtDialect(rotary, linears, 21), kind, linears, window, softcap)
    past, length = 5, 3
    q = torch.randn(1, HEADS, length, DIM, generator=generator)
    k, v = (torch.randn(1, KV, past + length, DIM, generator=generator) for _ in range(2))
    turned_q = rotate(q, rotary.cos, rotary.sin, torch.arange(past, past + length)[None], interleaved)
    turned_k = rotate(k, rotary.cos, rotary.sin, torch.arange(past + length)[None], interleaved)
    feed = feed_of(kind, q, k, v, past)
    feed["past_key"] = turned_k[:, :, :past].numpy().astype(kind.numpy())  # the cache holds rotated keys
    names = {i.name for i in graph.get_inputs()}
    got = torch.from_numpy(graph.run(["out0"], {n: a for n, a in feed.items() if n in names})[0])
    want = expected(turned_q, turned_k, v, window, softcap)
    assert (got.double() - want).abs().max() <= LIMITS[kind] * want.abs().max()


@pytest.mark.parametrize(("kind", "window", "softcap"), list(itertools.product(LIMITS, (-1, 3), (0.0, 5.0))))
def test_standard_attention_masks_and_caps(kind: ir.DataType, window: int, softcap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    linears = emitter(kind)
    graph = attention_graph(StandardDialect(23), kind, linears, window, softcap)
    past, length = 5, 3
    q = torch.randn(1, HEADS, length, DIM, generator=generator)
    k, v = (torch.randn(1, KV, past + length, DIM, generator=generator) for _ in range(2))
    names = {i.name for i in graph.get_inputs()}
    feed = {n: a for n, a in feed_of(kind, q, k, v, past).items() if n in names}
    out, key, value = (torch.from_numpy(a) for a in graph.run(["out0", "out1", "out2"], feed))
    want = expected(q, k, v, window, softcap)
    assert (out.double() - want).abs().max() <= LIMITS[kind] * want.abs().max()
    assert (key.float() - k).abs().max() <= 4e-3 and (value.float() - v).abs().max() <= 4e-3


@pytest.mark.parametrize("kind", list(LIMITS))
@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_and_its_skip_form(kind: ir.DataType, fused: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, 3, HIDDEN, generator=generator) for _ in range(2))
    scale = torch.randn(HIDDEN, generator=generator)
    linears, tape = emitter(kind), Tape()
    inputs = [typed(n, kind, [2, 3, HIDDEN]) for n in ("x", "y")]
    total = tape.op("Add", inputs) if fused else inputs[0]
    total.shape, total.type = inputs[0].shape, inputs[0].type
    dialect = OrtDialect(tables(False), linears, 21)
    normed, again = dialect.rms_norm(tape, total, linears.constant("scale", scale), 1e-5)
    assert (again is not None) == fused
    graph = session(tape, inputs, [normed, *([again] if again is not None else [])], linears, 21)
    got = [
        torch.from_numpy(a)
        for a in graph.run(None, {n: t.numpy().astype(kind.numpy()) for n, t in (("x", x), ("y", y))})
    ]
    summed = (x + y if fused else x).double()
    want = summed * torch.rsqrt(summed.pow(2).mean(-1, keepdim=True) + 1e-5) * scale
    assert (got[0].double() - want).abs().max() <= LIMITS[kind] * want.abs().max()
    if fused:
        assert (got[1].double() - summed).abs().max() <= LIMITS[kind] * summed.abs().max()
