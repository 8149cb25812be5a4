"""The decoder in TensorRT's dialect against PyTorch, in ONNX Runtime, and built by TensorRT for RTX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.tape import Tape

from tests.lower.onnx import decoding
from tests.lower.onnx.decoding import Model, relative
from tests.lower.onnx.rtx import build_engine
from tests.tiny import make_tiny
from vlmexport.demo import model_dir
from vlmexport.demo.variants import make_range_variant
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx.decoder import DecoderGraph
from vlmexport.lower.onnx.dialect import AttentionCall
from vlmexport.lower.onnx.dialects.tensorrt import TensorRTDialect
from vlmexport.lower.onnx.rotary import Rotary
from vlmexport.lower.onnx.weights import typed_value
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import QuantScheme, make_scheme

CACHE = 160
PLAIN = OnnxOptions("tensorrt", "tensorrt", None, attention="static", cache_length=CACHE)
EXACT = dataclasses.replace(PLAIN, decoder_dtype="fp32")
SETTINGS = decoding.load_target("tensorrt").onnx
SCHEMES = [make_scheme("rtn", 4, 32), make_scheme("rtn", 4, 64), make_scheme("rtn", 4, 128), make_scheme("rtn", 8, -1)]
DIFF, KL = 2e-2, 1e-5  # of logits and nats; the bundled model's logits reach 19
WINDOW = 5
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
    "glm": {},  # rotates half of each head, which stays in the trace
}


class Static:
    """One decoder graph with a static cache; `level` is ONNX Runtime's accuracy level for products that it fuses."""

    def __init__(self, path: Path, level: int | None = 0) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of each copy of the cache
        if level is not None:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.dtype = np.float16 if "float16" in self.inputs["inputs_embeds"].type else np.float32

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        pasts = {n: i for n, i in self.inputs.items() if n.startswith("past_key_values.")}
        return {n: np.zeros((batch, *i.shape[1:]), self.dtype) for n, i in pasts.items()}

    def run(
        self,
        embeds: torch.Tensor,
        first: list[int],
        past: dict[str, np.ndarray],
        kept: list[list[int]] | None = None,
        **extra: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """Logits of the `kept` new positions (None: all) and the cache, for rows that begin at the slots `first`."""
        rows, length = embeds.shape[:2]
        feed = {
            "inputs_embeds": embeds.float().numpy().astype(self.dtype),
            "write_indices": np.array(first, np.int64),
            "logits_positions": np.array(kept or [list(range(length))] * rows, np.int64),
            **past,
            **{name: tensor.numpy() for name, tensor in extra.items()},
        }
        out = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        present = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
        return torch.from_numpy(out["logits"]), present


def lower(model: Model, options: OnnxOptions = PLAIN, **changes: Any) -> DecoderGraph:
    return decoding.lower(model, options, **changes)


def on_codes(model: Model, graph: DecoderGraph, embeds: torch.Tensor) -> torch.Tensor:
    """PyTorch's logits with the weights that the graph's codes stand for."""
    before = decoding.dequantize_linears(model, graph)
    try:
        return model.logits(embeds)
    finally:
        decoding.restore(model, before)


def divergence(got: torch.Tensor, want: torch.Tensor) -> float:
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def noise(model: Model, batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, model.vlm.facts.hidden_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundled() -> Model:
    return decoding.load(model_dir(), torch.float32)


@pytest.fixture(scope="module")
def prompt(bundled: Model) -> torch.Tensor:
    """The longest of the model's own examples, picture included: ``[1, S, H]``."""
    found: torch.Tensor = max((e["inputs_embeds"] for e in bundled.part.examples), key=lambda x: x.shape[1])
    return found.float()


@pytest.fixture(scope="module")
def plain(bundled: Model, tmp_path_factory: pytest.TempPathFactory) -> Static:
    return Static(decoding.write(lower(bundled), tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def tiny(tiny_idefics3: Path) -> Model:
    return decoding.load(tiny_idefics3)


@pytest.fixture(scope="module")
def exact(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Static:
    """Float32 activations: whatever differs is not rounding."""
    return Static(decoding.write(lower(tiny, EXACT), tmp_path_factory.mktemp("exact")))


def test_float16_logits_are_pytorchs(bundled: Model, prompt: torch.Tensor, plain: Static) -> None:
    want = bundled.logits(prompt)
    got, _ = plain.run(prompt, [0], plain.empty(1))
    assert float((got - want).abs().max()) <= DIFF
    assert divergence(got, want) <= KL


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_quantized_logits_are_pytorchs_on_the_codes(
    bundled: Model, prompt: torch.Tensor, tmp_path: Path, scheme: QuantScheme
) -> None:
    graph = lower(bundled, dataclasses.replace(PLAIN, scheme=scheme))
    path = decoding.write(graph, tmp_path)
    want = on_codes(bundled, graph, prompt)
    session = Static(path)
    got, _ = session.run(prompt, [0], session.empty(1))
    assert float((got - want).abs().max()) <= DIFF
    assert divergence(got, want) <= KL
    fused = Static(path, None)  # as ONNX Runtime fuses it, activations rounded to 8 bits
    got, _ = fused.run(prompt, [0], fused.empty(1))
    assert relative(got, want) <= 1.5e-2 and divergence(got, want) <= 1e-3
    assert {m.name for r in graph.linears.records for m in r.members} == {
        w.name for w in graph.linears.plan.weights if w.action == "quantize"
    }


def test_64_decode_steps(bundled: Model, prompt: torch.Tensor, plain: Static) -> None:
    table = bundled.split.parts[decoding.Role.EMBEDDING].module.weight
    ids = torch.randint(0, len(table), (64,), generator=torch.Generator().manual_seed(1))
    start, x = prompt.shape[1], torch.cat([prompt, table[ids].detach().float()[None]], dim=1)
    want = bundled.logits(x)
    got, past = plain.run(prompt, [0], plain.empty(1), [[start - 1]])
    assert float((got[:, 0] - want[:, start - 1]).abs().max()) <= DIFF
    for slot in range(start, x.shape[1]):
        got, past = plain.run(x[:, slot : slot + 1], [slot], past)
        assert float((got[:, 0] - want[:, slot]).abs().max()) <= DIFF
        assert divergence(got[:, 0], want[:, slot]) <= KL


def test_ragged_batches_padded_on_the_right(tiny: Model, exact: Static) -> None:
    lengths, x = [7, 4], noise(tiny, 2, 9)
    got, past = exact.run(x[:, :7], [0, 0], exact.empty(2), [[0, 6], [0, 3]])
    for row, length in enumerate(lengths):
        want = tiny.logits(x[row : row + 1, :length])[0]
        assert relative(got[row], want[[0, -1]]) <= 1e-5
    for step in (0, 1):  # the second row overwrites what padding left in its slots
        first = [length + step for length in lengths]
        got, past = exact.run(x[:, 7 + step : 8 + step], first, past)
        for row, length in enumerate(lengths):
            alone = torch.cat([x[row : row + 1, :length], x[row : row + 1, 7 : 8 + step]], dim=1)
            assert relative(got[row, 0], tiny.logits(alone)[0, -1]) <= 1e-5


def test_a_prompt_in_chunks_up_to_the_last_slot(tiny: Model, exact: Static) -> None:
    x = noise(tiny, 1, CACHE)
    want, past, start = tiny.logits(x), exact.empty(1), 0
    for length in (1, 6, 50, CACHE - 58, 1):
        got, past = exact.run(x[:, start : start + length], [start], past)
        assert relative(got, want[:, start : start + length]) <= 1e-5
        start += length
    assert start == CACHE


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_rotations_of_other_decoders(tmp_path: Path, kind: str) -> None:
    folder = make_tiny("llava", tmp_path / kind, text_type=kind, text=KINDS[kind], vision_layers=1)
    model = decoding.load(folder)
    graph = lower(model, EXACT)
    assert (graph.traced.rotary is None) == (kind != "mistral")
    session = Static(decoding.write(graph, tmp_path / "fp32"))
    x = noise(model, 1, 3 * WINDOW)
    want = model.logits(x)
    got, past = session.run(x[:, :9], [0], session.empty(1))
    assert relative(got, want[:, :9]) <= 1e-5
    for slot in range(9, x.shape[1]):
        got, past = session.run(x[:, slot : slot + 1], [slot], past)
        assert relative(got[:, 0], want[:, slot]) <= 1e-5
    half = decoding.write(lower(model), tmp_path / "fp16")
    session = Static(half)
    got, _ = session.run(x, [0], session.empty(1))
    assert relative(got, want) <= 6e-3
    assert isinstance(engine(half), int)


@pytest.mark.slow
def test_repeated_layers_are_the_full_trace(tiny: Model, tmp_path: Path, exact: Static) -> None:
    full = Static(decoding.write(lower(tiny, EXACT, repeat=False), tmp_path))
    x = noise(tiny, 2, 5)
    assert torch.equal(exact.run(x, [0, 0], exact.empty(2))[0], full.run(x, [0, 0], full.empty(2))[0])


@pytest.mark.slow
def test_products_beyond_float16_stay_finite(tmp_path: Path) -> None:
    variant = decoding.load(make_range_variant(model_dir(), tmp_path / "range"), torch.float32)
    x = max((e["inputs_embeds"] for e in variant.part.examples), key=lambda e: e.shape[1]).float()
    for scheme in (None, make_scheme("rtn", 4, 64)):
        graph = lower(variant, dataclasses.replace(PLAIN, scheme=scheme))
        assert graph.linears.wide
        session = Static(decoding.write(graph, tmp_path / str(scheme is None)))
        got, _ = session.run(x, [0], session.empty(1))
        assert float((got - on_codes(variant, graph, x)).abs().max()) <= DIFF


def test_a_shifted_index_and_a_scaled_scale_are_seen(bundled: Model, prompt: torch.Tensor, tmp_path: Path) -> None:
    graph = lower(bundled, dataclasses.replace(PLAIN, scheme=SCHEMES[1]))
    path = decoding.write(graph, tmp_path)
    want, middle = on_codes(bundled, graph, prompt), prompt.shape[1] // 2
    session = Static(path)
    _, past = session.run(prompt[:, :middle], [0], session.empty(1))
    right, _ = session.run(prompt[:, middle:], [middle], past)
    assert float((right - want[:, middle:]).abs().max()) <= DIFF
    for shift in (-1, 1):
        wrong, _ = session.run(prompt[:, middle:], [middle + shift], past)
        assert float((wrong - want[:, middle:]).abs().max()) > 5 * DIFF
    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name.endswith("layers.1.self_attn.o_proj.weight.scale"))
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float16) * np.float16(1.05)).tobytes()
    onnx.save(model, tmp_path / "scaled.onnx")
    wrong, _ = Static(tmp_path / "scaled.onnx").run(prompt, [0], session.empty(1))
    assert float((wrong - want).abs().max()) > 5 * DIFF


def test_the_graph_is_that_of_the_contract(tiny: Model, tmp_path: Path) -> None:
    graph = lower(tiny, dataclasses.replace(PLAIN, scheme=SCHEMES[0]))
    path = decoding.write(graph, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    model, kv = graph.model, tiny.vlm.facts.kv
    assert model.graph.opset_imports == {"": 24} and model.ir_version == 12
    assert {n.domain for n in model.graph} == {""}
    cache = [f"{i}.{kind}" for i in range(kv.layers) for kind in ("key", "value")]
    inputs = {str(v.name): v for v in model.graph.inputs}
    assert list(inputs)[:3] == ["inputs_embeds", "write_indices", "logits_positions"]
    assert list(inputs)[3:] == [f"past_key_values.{name}" for name in cache]
    outputs = {str(v.name): v for v in model.graph.outputs}
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    for name in cache:
        for value in (inputs[f"past_key_values.{name}"], outputs[f"present.{name}"]):
            assert value.dtype == ir.DataType.FLOAT16
            assert value.shape == ir.Shape(["batch_size", kv.heads, CACHE, kv.head_dim])
    assert outputs["logits"].dtype == ir.DataType.FLOAT
    norms = [n for n in model.graph if n.op_type == "RMSNormalization"]
    assert len(norms) == 2 * kv.layers + 1
    assert {v.dtype for n in norms for v in n.inputs if v is not None} == {ir.DataType.FLOAT}
    attentions = [n for n in model.graph if n.op_type == "Attention"]
    assert all(len(n.outputs) == 1 and "softmax_precision" not in n.attributes for n in attentions)
    assert len({n.inputs[3] for n in attentions}) == 1


def engine(path: Path) -> str | int:
    """The engine of a decoder with a profile for prompts and one for single tokens, or why there is none."""

    def dims(name: str, given: tuple[int, ...], size: int) -> tuple[int, ...]:
        lengths = {"inputs_embeds": (1, size, given[-1]), "write_indices": (1,), "logits_positions": (1, 1)}
        return lengths.get(name, (1, *given[1:]))

    return build_engine(path, dims, (32, 1))


@pytest.mark.parametrize("scheme", [None, SCHEMES[0], SCHEMES[3]], ids=str)
def test_tensorrt_builds_it(tiny: Model, tmp_path: Path, scheme: QuantScheme | None) -> None:
    path = decoding.write(lower(tiny, dataclasses.replace(PLAIN, scheme=scheme)), tmp_path)
    assert isinstance(engine(path), int)


def test_tensorrt_refuses_capped_scores(tiny: Model, tmp_path: Path) -> None:
    model = onnx.load(decoding.write(lower(tiny), tmp_path))
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    onnx.save(model, tmp_path / "capped.onnx")
    assert "softcap is not supported" in str(engine(tmp_path / "capped.onnx"))


def dialect(length: int, rows: int) -> TensorRTDialect:
    linears = decoding.decoder.LinearEmitter(decoding.DecoderWeights({}), None, ir.DataType.FLOAT16, 0)  # type: ignore[arg-type]
    return TensorRTDialect(linears, 24, length, Rotary(torch.ones(rows, 8), torch.ones(rows, 8), False, ""))


def test_capped_scores_are_refused_by_name() -> None:
    value = typed_value("x", ir.DataType.FLOAT16, ["batch_size", 2, "sequence_length", 16])
    call = AttentionCall(value, value, value, None, 2, 2, 16, 0.25, 30.0, -1, value, value)
    with pytest.raises(UnsupportedModelError, match=r"capped at 30 \(softcap\)"):
        dialect(16, 16).attention(Tape(), call)


def test_a_cache_beyond_the_rotary_table_is_refused() -> None:
    dialect(16, 16)
    with pytest.raises(BadInputError, match="hold 17 tokens; the model knows 16 positions"):
        dialect(17, 16)
