"""GroupQueryAttention with an INT8 cache, bit for bit, and the decoder that is built of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.lower.onnx import test_dialects as plain
from tests.lower.onnx.decoding import Model, load
from tests.tiny import make_tiny
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.decoder import lower_decoder
from vlmexport.lower.onnx.dialect import AttentionCall
from vlmexport.lower.onnx.dialects.ort import OrtDialect
from vlmexport.lower.onnx.rotary import rotate
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.quantize.fold import Fold
from vlmexport.quantize.kv_cache import CachePeaks, LayerPeaks
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.names import weight_names
from vlmexport.target import load_target

KV, DIM, HEADS = plain.KV, plain.DIM, plain.HEADS
INT8 = ir.DataType.INT8


def peaks_of(seed: int = 5) -> CachePeaks:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(KV, 40, DIM, generator=generator) for _ in range(2))
    return CachePeaks((LayerPeaks.of(key, value),))


def rounded(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The operator's codes: float32, the reciprocal first, ties to even, both ends clamped."""
    return (states.float() * (1 / scale)).round().clamp(-128, 127)


def attention_graph(dialect: OrtDialect, kind: ir.DataType, window: int, softcap: float) -> Any:
    tape = plain.Tape()
    heads = {"q": HEADS, "k": KV, "v": KV}
    qkv = {n: plain.typed(n, kind, ["batch_size", h, "sequence_length", DIM]) for n, h in heads.items()}
    past = {
        n: plain.typed(n, INT8, ["batch_size", KV, "past_sequence_length", DIM]) for n in ("past_key", "past_value")
    }
    shared = {
        "inputs_embeds": plain.typed("inputs_embeds", kind, ["batch_size", "sequence_length", plain.HIDDEN]),
        "attention_mask": plain.typed("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]),
    }
    dialect.prologue(tape, shared, past["past_key"])
    call = AttentionCall(qkv["q"], qkv["k"], qkv["v"], None, HEADS, KV, DIM, DIM**-0.5, softcap, window, *past.values())
    out = dialect.attention(tape, call)
    for present in (out.present_key, out.present_value):
        present.type = ir.TensorType(INT8)
    outputs = [out.output, out.present_key, out.present_value]
    return plain.session(tape, [*qkv.values(), *past.values(), *shared.values()], outputs, dialect.linears, 21)


@pytest.mark.parametrize("kind", list(plain.LIMITS))
@pytest.mark.parametrize(("interleaved", "window", "softcap"), [(False, -1, 0.0), (True, 3, 0.0), (False, -1, 5.0)])
def test_attention_is_over_the_rounded_cache_new_tokens_included(
    kind: ir.DataType, interleaved: bool, window: int, softcap: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    rotary, linears = plain.tables(interleaved), plain.emitter(kind)
    dialect = OrtDialect(rotary, linears, 21, peaks_of())
    graph = attention_graph(dialect, kind, window, softcap)
    key_scale, value_scale = dialect.cache_scales[0]
    past, length = 5, 3
    half = kind.numpy()
    q = torch.randn(1, HEADS, length, DIM, generator=generator)
    k, v = (torch.randn(1, KV, past + length, DIM, generator=generator) for _ in range(2))
    v = torch.from_numpy(v.numpy().astype(half)).float()
    turned_q = rotate(q, rotary.cos, rotary.sin, torch.arange(past, past + length)[None], interleaved)
    turned_k = rotate(k, rotary.cos, rotary.sin, torch.arange(past + length)[None], interleaved)
    codes = {"past_key": rounded(turned_k, key_scale), "past_value": rounded(v, value_scale)}
    names = {i.name for i in graph.get_inputs()}
    feed = {n: a for n, a in plain.feed_of(kind, q, k, v, past).items() if n in names}
    feed |= {n: c[:, :, :past].numpy().astype(np.int8) for n, c in codes.items()}
    out, key, value = (torch.from_numpy(a) for a in graph.run(["out0", "out1", "out2"], feed))
    assert torch.equal(value.float(), codes["past_value"])
    assert (key.float() - codes["past_key"]).abs().max() <= (0 if kind == ir.DataType.FLOAT else 1)
    want = plain.expected(turned_q, key.float() * key_scale, value.float() * value_scale, window, softcap)
    assert (out.double() - want).abs().max() <= plain.LIMITS[kind] * want.abs().max()


def test_rounding_is_by_the_reciprocal_to_even_and_clamped() -> None:
    """Values on and beside every tie: dividing instead of multiplying would miss thousands of these."""
    linears = plain.emitter(ir.DataType.FLOAT)
    dialect = OrtDialect(plain.tables(False), linears, 21, peaks_of())
    graph = attention_graph(dialect, ir.DataType.FLOAT, -1, 0.0)
    scale = dialect.cache_scales[0][1]
    ties = torch.arange(-131, 131).float()[None, None, :, None] + 0.5
    exact = (ties * scale).numpy()
    beside = [np.nextafter(exact, np.float32(end)) for end in (-np.inf, np.inf)]
    v = torch.from_numpy(np.concatenate([exact, *beside], axis=2))
    length = v.shape[2]
    dummy = torch.zeros(1, KV, length, DIM)
    names = {i.name for i in graph.get_inputs()}
    feed = plain.feed_of(ir.DataType.FLOAT, torch.zeros(1, HEADS, length, DIM), dummy, v, 0)
    feed = {n: a for n, a in feed.items() if n in names}
    feed |= {n: np.zeros((1, KV, 0, DIM), np.int8) for n in ("past_key", "past_value")}
    dialect_rows = dialect.rotary.cos.shape[0]
    chunks = []
    for start in range(0, length, dialect_rows):  # the rotary tables end there
        stop = min(start + dialect_rows, length)
        cut = {n: a[:, :, start:stop] if n in "qkv" else a for n, a in feed.items()}
        cut["inputs_embeds"] = feed["inputs_embeds"][:, start:stop]
        cut["attention_mask"] = feed["attention_mask"][:, start:stop]
        chunks.append(graph.run(["out2"], {n: np.ascontiguousarray(a) for n, a in cut.items() if n in names})[0])
    found = torch.from_numpy(np.concatenate(chunks, axis=2)).float()
    assert torch.equal(found, rounded(v, scale))
    assert found.min() == -128 and found.max() == 127
    assert (found != (v / scale).round().clamp(-128, 127)).sum() > 100


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Iterator[Model]:
    yield load(tiny_llava)


def lowered(model: Model, **changes: Any) -> Any:
    target, kv = load_target("cpu"), model.vlm.facts.kv
    plan = plan_export(model.vlm, model.split, target, OnnxOptions(scheme=None, kv_cache="int8"))
    generator = torch.Generator().manual_seed(1)
    peaks = CachePeaks(
        tuple(
            LayerPeaks.of(*(torch.randn(kv.heads, 9, kv.head_dim, generator=generator) for _ in range(2)))
            for _ in range(kv.layers)
        )
    )
    weights = DecoderWeights(weight_names(model.vlm.model, model.part.module), plan.schemes, cache_peaks=peaks)
    weights = dataclasses.replace(weights, **changes)
    return lower_decoder(model.vlm, model.part, plan, target, weights), peaks


def fold_of(model: Model, projection: str) -> tuple[str, torch.Tensor]:
    name = next(n for n in weight_names(model.vlm.model, model.part.module) if f"layers.1.self_attn.{projection}" in n)
    kv = model.vlm.facts.kv
    return name, torch.linspace(0.5, 3.0, kv.heads * kv.head_dim)


def test_every_layer_of_the_decoder_has_int8_caches_and_its_own_scales(model: Model) -> None:
    graph, peaks = lowered(model)
    kv = model.vlm.facts.kv
    caches = [v for v in (*graph.model.graph.inputs, *graph.model.graph.outputs) if v.name.startswith(("past", "pres"))]
    assert len(caches) == 4 * kv.layers
    assert {v.dtype for v in caches} == {INT8}
    wanted = [s for layer in peaks.layers for s in (layer.key_scale(False), layer.value_scale())]
    assert all(torch.equal(a, b) for a, b in zip(graph.cache_scales, wanted, strict=True))
    nodes = [n for n in graph.model.graph if n.op_type == "GroupQueryAttention"]
    assert [n.inputs[13].name for n in nodes] == [f"kv_cache.{i}.value_scale" for i in range(kv.layers)]


def test_scales_of_values_follow_the_fold_of_their_projection(model: Model) -> None:
    name, rows = fold_of(model, "v_proj")
    graph, peaks = lowered(model, folds={name: Fold(rows=rows)})
    assert torch.equal(graph.cache_scales[3], peaks.layers[1].value_scale(rows))
    assert torch.equal(graph.cache_scales[1], peaks.layers[0].value_scale())


def test_a_fold_of_keys_under_rotary_is_refused(model: Model) -> None:
    name, rows = fold_of(model, "k_proj")
    with pytest.raises(ValueError, match=r"k_proj.weight: a fold scales keys that are cached after rotary"):
        lowered(model, folds={name: Fold(rows=rows)})


@pytest.mark.slow
def test_a_fold_of_values_that_are_cut_from_a_fused_projection_is_refused(tmp_path: Path) -> None:
    fused = load(make_tiny("llava", tmp_path / "fused", text_type="phi3", kv_heads=4))
    name = next(n for n in weight_names(fused.vlm.model, fused.part.module) if n.endswith("qkv_proj.weight"))
    lowered(fused)
    with pytest.raises(
        UnsupportedModelError, match=r"scaled rows of .*qkv_proj\.weight, of which the values are a part"
    ):
        lowered(fused, folds={name: Fold(rows=torch.full((384,), 2.0))})
