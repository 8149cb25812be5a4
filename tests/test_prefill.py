"""``--prefill int8`` from the options to the gate: what it refuses, what it writes, and every fault turns it red."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.verify.mutate import damaged
from vlmexport import pipeline
from vlmexport.cpu import int8_gain
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.lower.onnx.int8 import pack_int8
from vlmexport.lower.onnx.prefill import int8_product
from vlmexport.manifest import PREFILL_PART, Artifact, open_artifact
from vlmexport.plan import OnnxOptions, check_options
from vlmexport.prefill import INT8_ROWS, prompt_schemes
from vlmexport.progress import SilentProgress
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.runtime import ort
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.target import load_target
from vlmexport.verify.codes import account, read_codes, unpack_int8, unrecorded_matrices
from vlmexport.verify.gates import Gate
from vlmexport.verify.prefill import check_products
from vlmexport.verify.run import verify_artifact

RTN = QuantScheme(bits=4, group_size=32)
OPTIONS = OnnxOptions(scheme=RTN, prefill="int8")
GRAPH = f"{PREFILL_PART}.onnx"
# The weights are random: nearly equal logits make 4 bits lose many top tokens, which the gate rightly reports.
HONEST_LOSS = {"quantization/kl", "quantization/top1", "quantization/perplexity_ratio"}
pytestmark = pytest.mark.skipif(
    int8_gain(ort.cpu_flags())[0] is False, reason="the CPU has no INT8 dot product: such exports do not run here"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these sizes need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def export(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("prefill") / "export"
    pipeline.export_onnx(str(tiny_idefics3), out, OPTIONS, force=False, verify=False, progress=SilentProgress())
    return open_artifact(out)


def prompt(export: Artifact, tokens: int = 9, rows: int = 1) -> np.ndarray:
    width = export.manifest.model["hidden_size"]
    return np.random.default_rng(0).standard_normal((rows, tokens, width)).astype(np.float32)


def ones(embeds: np.ndarray) -> np.ndarray:
    return np.ones(embeds.shape[:2], np.int64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"target": "cuda"}, "CPU profiles"),
        ({"attention": "standard"}, "--attention gqa"),
        ({"scheme": None}, "quantized decoder"),
        ({"decoder_dtype": "fp16"}, "--decoder-dtype fp32"),
        ({"kv_cache": "int8"}, "--kv-cache same"),
    ],
)
def test_what_does_not_go_with_it_is_refused(change: dict[str, object], word: str) -> None:
    options = dataclasses.replace(OPTIONS, **change)
    with pytest.raises(BadInputError, match=word):
        check_options(options, load_target(options.target))


def test_the_prompt_graph_holds_int8_copies_and_shares_the_rest(export: Artifact) -> None:
    plan = {w["name"]: w for w in export.manifest.plan["weights"]}
    own, faults = read_codes(export, PREFILL_PART)
    decoding, _ = read_codes(export)
    assert faults == [] and unrecorded_matrices(export) == []
    assert decoding.keys() - own.keys() == {"lm_head.weight"}
    assert own.keys() <= decoding.keys()
    assert all(plan[name]["action"] == "quantize" for name in own)
    planned = export.manifest.plan["prefill_bytes"]
    assert planned == sum(t.codes.numel() + 4 * t.shape[0] for t in own.values())
    graph = onnx.load(export.path / GRAPH, load_external_data=False).graph
    places = {i.name: {e.key: e.value for e in i.external_data}.get("location") for i in graph.initializer}
    assert places["lm_head.weight.codes"] == "decoder.onnx_data"
    assert {p for n, p in places.items() if n.startswith("prefill.") and p} == {f"{GRAPH}_data"}


def test_codes_come_from_the_original_weights(export: Artifact, tiny_idefics3: Path) -> None:
    from safetensors.torch import load_file

    own, _ = read_codes(export, PREFILL_PART)
    name = "model.text_model.layers.1.mlp.down_proj.weight"
    original = load_file(tiny_idefics3 / "model.safetensors")[name]
    wanted = quantize_rtn(original, INT8_ROWS)
    assert torch.equal(own[name].codes, wanted.codes)
    assert own[name].digest() == wanted.digest()


def test_decoding_is_the_plain_exports(export: Artifact, tiny_idefics3: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(OPTIONS, prefill="same")
    pipeline.export_onnx(
        str(tiny_idefics3), tmp_path / "p", plain, force=False, verify=False, progress=SilentProgress()
    )
    files = open_artifact(tmp_path / "p").manifest.files
    for name in ("decoder.onnx", "decoder.onnx_data"):
        assert export.manifest.files[name] == files[name]


def test_prompts_in_chunks_are_the_same_prompt(export: Artifact) -> None:
    runner, embeds = OnnxRunner(export, threads=1), prompt(export, 30)
    session = runner._decoder
    whole, cache = runner.prefill(embeds, ones(embeds), 0)
    session.chunk = 7
    parts, cut = runner.prefill(embeds, ones(embeds), 0)
    last, _ = runner.prefill(embeds, ones(embeds), 1)
    assert parts.shape == whole.shape
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)
    np.testing.assert_allclose(cut.stored(1, "value", 0, 30), cache.stored(1, "value", 0, 30), atol=1e-5)


def test_several_tokens_run_int8_and_one_token_the_plain_graph(export: Artifact) -> None:
    runner, embeds = OnnxRunner(export, threads=1), prompt(export, 12)
    _, cache = runner.prefill(embeds, ones(embeds))
    ran: list[int] = []
    session = runner._decoder
    run = session._run_bound
    session._run_bound = lambda graph, *rest: ran.append(graph) or run(graph, *rest)
    runner.decode(embeds[:, :1], cache)
    runner.decode(embeds[:, :4], cache)
    assert ran == [0, 1]
    assert cache.lengths.tolist() == [17]


def test_a_product_is_integer_arithmetic_on_rounded_rows() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[2] *= 1e4  # one row's range must not be another's
    weight = quantize_rtn(torch.randn(32, 64, generator=torch.Generator().manual_seed(2)), INT8_ROWS)
    exact = x @ weight.dequantize().t()
    error = (int8_product(x, weight) - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.02
    assert unpack_int8(*pack_int8(weight)).digest() == weight.digest()


def test_pack_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="one scale per output row"):
        pack_int8(quantize_rtn(torch.ones(4, 64), QuantScheme(bits=8, group_size=32)))


def test_the_head_stays_with_decoding(export: Artifact) -> None:
    class Weight:
        def __init__(self, name: str, action: str) -> None:
            self.name, self.action = name, action

    weights = [Weight("a", "quantize"), Weight("head", "quantize"), Weight("norm", "keep")]
    assert prompt_schemes(weights, "head") == {"a": INT8_ROWS}


def test_which_cpus_gain() -> None:
    assert int8_gain(frozenset({"avx2", "avx512_vnni"}))[0] is True
    assert int8_gain(frozenset({"amx_int8"}))[1].startswith("amx_int8")
    assert int8_gain(frozenset({"avx2"}), "x86_64")[0] is False
    assert int8_gain(frozenset({"asimddp"}), "aarch64")[0] is None
    assert int8_gain(frozenset())[0] is None


def test_a_cpu_whose_products_overflow_is_refused(export: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "int8_gain", lambda _flags: (False, "none of the instructions"))
    with pytest.raises(NotPossibleHereError, match="--prefill int8"):
        OnnxRunner(export, threads=1).load()


def products(export: Artifact) -> list[str]:
    gate, runner = Gate(), OnnxRunner(export, threads=1)
    check_products(gate, export, runner.settings, runner._decoder.kv, DecoderInputs(prompt(export)), 1e-5)
    return [f"{c.status}: {c.reason}" for c in gate.checks]


def test_every_product_is_judged(export: Artifact) -> None:
    assert [text.split(":")[0] for text in products(export)] == ["passed"]


def wrong_zero_point(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    tensor = next(i for i in model.graph.initializer if i.name == "prefill.middle")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(127, np.uint8), tensor.name))
    node = next(n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat")
    node.input[4] = "other.middle"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), "other.middle"))
    onnx.save(model, folder / GRAPH)


def test_a_wrong_zero_point_turns_products_red(export: Artifact, tmp_path: Path) -> None:
    found = products(open_artifact(damaged(export.path, tmp_path / "d", wrong_zero_point)))
    assert found[0].startswith("failed") and "off by" in found[0]


def corrupted_scale(folder: Path) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    tensor = next(i for i in model.graph.initializer if i.name.endswith("down_proj.weight.scale"))
    entries = {e.key: e.value for e in tensor.external_data}
    if entries:
        kept = np.memmap(folder / entries["location"], np.float32, "r+", int(entries["offset"]), tuple(tensor.dims))
        kept[0] *= 1.5
        kept.flush()
        return
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] *= 1.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / GRAPH)


def test_one_wrong_scale_is_found_in_the_codes(export: Artifact, tmp_path: Path) -> None:
    broken = open_artifact(damaged(export.path, tmp_path / "d", corrupted_scale))
    _, faults = read_codes(broken, PREFILL_PART)
    assert [f.part for f in faults] == [PREFILL_PART]


def test_another_head_than_the_decode_graphs_is_found(export: Artifact, tmp_path: Path) -> None:
    def shifted(folder: Path) -> None:
        model = onnx.load(folder / GRAPH, load_external_data=False)
        tensor = next(i for i in model.graph.initializer if i.name == "lm_head.weight.codes")
        offset = next(e for e in tensor.external_data if e.key == "offset")
        offset.value = "0"
        onnx.save(model, folder / GRAPH)

    faults = unrecorded_matrices(open_artifact(damaged(export.path, tmp_path / "d", shifted)))
    assert [f.weight for f in faults] == ["lm_head.weight"]


def test_accounting_sees_a_prompt_weight_twice(export: Artifact) -> None:
    records = export.manifest.quantized
    twice = dataclasses.replace(export.manifest, quantized=(*records, records[-1]))
    assert any("times in the prompt graph" in f for f in account(Artifact(export.path, twice), []))


@pytest.mark.slow
def test_the_gate_is_green_and_a_wrong_scale_red(export: Artifact, tmp_path: Path) -> None:
    report = verify_artifact(export.path, threads=1)
    assert {c.name for c in report.checks if c.status == "failed"} <= HONEST_LOSS
    names = {c.name for c in report.checks if c.status == "passed"}
    assert {f"{PREFILL_PART}/signature", f"{PREFILL_PART}/products", "decoder/decode", "decoder/cache"} <= names
    broken = verify_artifact(damaged(export.path, tmp_path / "d", corrupted_scale), threads=1)
    assert any(c.part == PREFILL_PART and c.status == "failed" for c in broken.checks)


@pytest.mark.slow
def test_linears_with_outliers_go_in_blocks(
    tiny_idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmexport.lower.onnx.prefill.ERROR_LIMIT", 0.0085)
    out = tmp_path / "e"
    pipeline.export_onnx(str(tiny_idefics3), out, OPTIONS, force=False, verify=False, progress=SilentProgress())
    made = open_artifact(out)
    blocked = made.manifest.model["prefill"]["blocked"]
    sizes = {m.name: r.group_size for r in made.manifest.quantized if r.part == PREFILL_PART for m in r.members}
    assert 0 < len(blocked) < len(sizes), json.dumps(made.manifest.model["prefill"])
    assert {name for name, size in sizes.items() if size == 32} == blocked.keys()
    assert {c.name for c in verify_artifact(out, threads=1).checks if c.status == "failed"} <= HONEST_LOSS
