"""``vlmexport trt``: what it writes and prints, where engines are not built, and what it refuses in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import onnx
import pytest

from tests.model.importers.encoders import make_awq
from vlmexport.cli.main import run
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.tensorrt import build, lint
from vlmexport.manifest import open_artifact

Capture = pytest.CaptureFixture[str]
SMALL = ["--quant", "rtn", "--max-seq", "128", "--no-verify"]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (vlmexport[rtx])"
)


def sidecars(out: Path) -> dict[str, dict[str, object]]:
    """Every engine's sidecar, by the engine's name."""
    files = out.glob("engines/*/*.engine.json")
    return {file.name.removesuffix(".engine.json"): json.loads(file.read_text()) for file in files}


def last_error(capsys: Capture) -> str:
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_list_prints_every_gpu_without_a_model(capsys: Capture) -> None:
    assert run(["trt", "--gpu", "list"]) == 0
    printed = capsys.readouterr().out
    for name in ("t4", "a100-40", "a100-80", "h200", "rtx-5090", "thor"):
        assert name in printed
    assert "a100-80: a100 alone means this one" in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_a_gpu_that_rtx_does_not_build_for_gets_graphs_and_scripts(
    tiny_llava: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, report = tmp_path / "out", tmp_path / "result.json"
    arguments = ["trt", "--model", str(tiny_llava), "--gpu", "h100", "--out", str(out), "--json", str(report), *SMALL]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "engine not built: TensorRT for RTX has no target for NVIDIA H100" in printed
    assert "run ./build_engines.sh" in printed
    artifact = open_artifact(out)
    assert {"build_engines.sh", "build_engines.py", "engines.json", "decoder.onnx"} <= artifact.manifest.files.keys()
    assert not (out / "engines").exists()
    facts = json.loads(report.read_text())["tensorrt"]
    assert (facts["gpu"], facts["built"]["places"]) == ("h100", [])
    assert "Engine not built: TensorRT for RTX has no target" in (out / "README.md").read_text()
    for part in artifact.manifest.parts.values():
        graph = onnx.load(out / part.file, load_external_data=False)
        assert {node.domain for node in graph.graph.node} <= {""}
        assert {entry.version for entry in graph.opset_import if not entry.domain} == {24}


def test_engines_that_were_asked_for_end_with_4_and_leave_nothing(
    tiny_llava: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert run(["trt", "--model", str(tiny_llava), "--gpu", "b200", "--out", str(out), "--engines", *SMALL]) == 4
    assert "engine not built: " in last_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_without_rtx_the_install_line_is_named(
    tiny_llava: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "rtx_version", lambda: None)
    out = tmp_path / "out"
    assert run(["trt", "--model", str(tiny_llava), "--gpu", "a100", "--out", str(out), "--engines", *SMALL]) == 4
    assert "pip install 'vlmexport[rtx]'" in last_error(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a1000"], "a100"),
        (["--gpu", "t4", "--quant", "int4"], "takes no int4 weights"),
        (["--gpu", "a100", "--quant", "hqq"], "takes no zero points"),
        (["--gpu", "a100", "--quant", "fp16", "--bits", "4"], "no effect with --quant fp16"),
        (["--gpu", "a100", "--quant", "rtn", "--group-size", "16"], "group size is 16"),
        (["--gpu", "a100", "--max-batch", "0"], "--max-batch is 0"),
        (["--gpu", "rtx-4090", "--max-batch", "9000000", "--quant", "fp16"], "the largest that fits: batch"),
        (["--gpu", "a100", "--max-seq", "100000"], "max_position_embeddings"),
        (["--gpu", "a100", "--engines", "--backend", "script"], "exclude each other"),
    ],
)
def test_bad_choices_are_one_line_and_write_nothing(
    arguments: list[str], words: str, tiny_llava: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run(["trt", "--model", str(tiny_llava), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in last_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_the_lint_refuses_leaves_nothing(
    tiny_llava: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_more: object) -> None:
        raise UnsupportedModelError(f"{path.name} is not for TensorRT: RMSNormalization keeps its norm in FP16")

    monkeypatch.setattr(lint, "require_clean", refuse)
    out = tmp_path / "out"
    assert run(["trt", "--model", str(tiny_llava), "--gpu", "h100", "--out", str(out), *SMALL]) == 2
    assert "is not for TensorRT" in last_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_zero_points_of_a_checkpoint_are_refused_or_rounded_again(
    tiny_idefics3: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, _ = make_awq(tiny_idefics3, tmp_path / "awq")
    out = tmp_path / "out"
    arguments = ["trt", "--model", str(folder), "--gpu", "h100", "--max-seq", "128", "--no-verify", "--out", str(out)]
    assert run(arguments) == 2
    error = last_error(capsys)
    assert "takes no zero points" in error and "--requantize" in error
    assert run([*arguments, "--requantize"]) == 0
    manifest = open_artifact(out).manifest
    assert all(record.symmetric for record in manifest.quantized)
    reasons = {w["reason"] for w in manifest.plan["weights"] if w["action"] == "quantize"}
    assert any("--requantize" in reason and "asym" in reason for reason in reasons)
    assert "rounded again (--requantize)" in (out / "README.md").read_text()


def test_the_plan_shows_memory_and_floors(tiny_llava: Path, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "plan.json"
    options = ["--quant", "int8", "--max-seq", "128", "--json", str(report)]
    assert run(["plan", "trt", "--model", str(tiny_llava), "--gpu", "l4", *options]) == 0
    printed = capsys.readouterr().out
    assert "memory on l4" in printed and "300 GB/s" in printed and "never measurements" in printed
    data = json.loads(report.read_text())
    assert data["gpu"]["name"] == "l4" and data["limits"]["max_seq"] == 128


@needs_rtx
@pytest.mark.slow
def test_engines_are_built_without_a_gpu_and_reported_as_not_run(
    tiny_llava: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    arguments = ["trt", "--model", str(tiny_llava), "--gpu", "a100", "--out", str(out), *SMALL, "--two-decoders"]
    assert run([*arguments, "--triton"]) == 0
    printed = capsys.readouterr().out
    assert "and not run" in printed
    engines = sidecars(out)
    assert engines.keys() == {"vision_encoder", "projector", "embed_tokens", "decoder_prefill", "decoder_decode"}
    assert all(sidecar["compute_capabilities"] == ["8.0"] for sidecar in engines.values())
    assert (out / "triton" / "vlm" / "config.pbtxt").is_file()
    shutil.rmtree(out / "engines" / "sm80")
    assert run(["verify", str(out)]) == 2
    assert "missing" in last_error(capsys)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["rtx-3090", "rtx-4090", "rtx-5090"])
def test_the_bundled_model_builds_for_every_consumer_card(gpu: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["trt", "--model", "demo", "--gpu", gpu, "--out", str(out), "-q", "--engines", *SMALL]) == 0
    assert len(sidecars(out)) == 4


@needs_rtx
@pytest.mark.slow
def test_the_gate_judges_graphs_and_says_that_engines_did_not_run(tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "r.json"
    options = ["--quant", "rtn", "--max-seq", "256", "--json", str(report), "-q"]
    assert run(["trt", "--model", "demo", "--gpu", "a100", "--out", str(out), *options]) == 0
    judged = json.loads(report.read_text())["report"]
    states = {check["name"]: check["status"] for check in judged["checks"]}
    assert states["engines/run[sm80]"] == "not_run"
    assert all(state == "passed" for name, state in states.items() if not name.startswith("engines/run"))
    assert judged["status"] == "incomplete"
