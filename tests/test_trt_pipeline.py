"""The pipeline of ``vlmexport trt``: failed builds, findings of the lint, and the graphs beside a Triton folder."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.lower.tensorrt.lint_graphs import text, unary
from vlmexport.engines import EngineSpec
from vlmexport.errors import NotPossibleHereError, UnsupportedModelError
from vlmexport.gpu import load_gpu
from vlmexport.lower.tensorrt import build
from vlmexport.manifest import PartFile, open_artifact
from vlmexport.progress import SilentProgress
from vlmexport.trt_options import TrtOptions, trt_onnx_options, trt_scheme
from vlmexport.trt_pipeline import TrtResult, _build, _lint, export_trt
from vlmexport.trt_plan import EngineDecision, TrtPlan
from vlmexport.verify.codes import read_codes

CRASH = "TensorRT for RTX cannot build vision_encoder.onnx for SM80, its compiler crashed: CHECK(0) failed."
SMALL = TrtOptions(trt_onnx_options(trt_scheme("rtn")), "a100", max_seq=64)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (vlmexport[rtx])"
)


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX is here, builds one engine and crashes on the next."""

    def build_engines(folder: Path, *_rest: Any, **_more: Any) -> Any:
        place = folder / "engines" / "sm80"
        place.mkdir(parents=True)
        (place / "projector.engine").write_bytes(b"engine")
        raise NotPossibleHereError(CRASH)

    monkeypatch.setattr(build, "rtx_version", lambda: "1.7.1.116")
    monkeypatch.setattr(build, "build_engines", build_engines)


def export(model: Path | str, out: Path, options: TrtOptions) -> TrtResult:
    return export_trt(str(model), out, options, force=False, verify=False, progress=SilentProgress())


def built_in(folder: Path, **asked: Any) -> tuple[TrtPlan, tuple[Any, ...]]:
    """What `_build` makes of a plan that has TensorRT for RTX build for an A100."""
    nothing: Any = SimpleNamespace(parts={})
    plan = TrtPlan(nothing, replace(SMALL, **asked), load_gpu("a100"), nothing, {}, nothing, EngineDecision("rtx", ""))
    return _build(folder, nothing, (), plan, SilentProgress())


@pytest.mark.usefixtures("crash")
@pytest.mark.parametrize("asked", [{}, {"portable": True}, {"backend": "trt"}])
def test_a_failed_build_is_a_reason_and_leaves_no_engine(asked: dict[str, Any], tmp_path: Path) -> None:
    plan, built = built_in(tmp_path, **asked)
    assert (plan.engines, built) == (EngineDecision("", CRASH.rstrip(".")), ())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("crash")
@pytest.mark.parametrize("asked", [{"engines": True}, {"backend": "rtx"}])
def test_a_failed_build_of_engines_that_were_asked_for_ends_it(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NotPossibleHereError, match="its compiler crashed"):
        built_in(tmp_path, **asked)


@pytest.mark.slow
@pytest.mark.usefixtures("crash")
def test_an_export_is_finished_without_engines(tiny_llava: Path, tmp_path: Path) -> None:
    result = export(tiny_llava, tmp_path / "out", replace(SMALL, triton="onnxruntime"))
    assert (result.built, result.warnings) == ((), ())
    assert (result.plan.engines.builder, result.plan.engines.reason) == ("", CRASH.rstrip("."))
    assert not (tmp_path / "out" / "engines").exists()
    artifact = open_artifact(tmp_path / "out")
    built = artifact.manifest.model["tensorrt"]["built"]
    assert built == {"flavour": "", "version": "", "places": [], "reason": CRASH.rstrip(".")}
    assert f"Engine not built: {CRASH}" in (tmp_path / "out" / "README.md").read_text()
    # The repository of --triton onnxruntime beside them: onnx and the gate still read the quantized graph.
    assert onnx.load(tmp_path / "out" / "decoder.onnx").graph.node
    tensors, faults = read_codes(artifact)
    assert tensors and not faults


def linted(folder: Path, **graphs: onnx.ModelProto) -> tuple[str, ...]:
    parts = {role: PartFile(f"{role}.onnx", (), ()) for role in graphs}
    for role, model in graphs.items():
        onnx.save(model, folder / parts[role].file)
    emitted: Any = SimpleNamespace(parts=parts)
    return _lint(folder, emitted, [EngineSpec(role, role, ()) for role in graphs], ("fp16",))


def test_errors_of_all_graphs_are_listed(tmp_path: Path) -> None:
    refused = text("g (float[4] x) => (float[4] y) { y = Bernoulli(x) }")
    with pytest.raises(UnsupportedModelError) as caught:
        linted(tmp_path, projector=refused, embed_tokens=unary("Relu"), decoder=refused)
    first, second = str(caught.value).splitlines()
    assert first.startswith("projector.onnx is not for TensorRT: Bernoulli y: ")
    assert second.startswith("decoder.onnx is not for TensorRT: Bernoulli y: ")


def test_warnings_of_all_graphs_are_returned(tmp_path: Path) -> None:
    doubles = unary("Relu", "double")
    warnings = linted(tmp_path, projector=doubles, embed_tokens=unary("Relu"), decoder=doubles)
    assert {line.split(": ")[0] for line in warnings} == {"projector.onnx", "decoder.onnx"}
    assert len(linted(tmp_path, embed_tokens=unary("Relu"))) == 0


@needs_rtx
@pytest.mark.slow
def test_engines_for_a_single_image_are_built(tmp_path: Path) -> None:
    options = replace(SMALL, onnx=trt_onnx_options(None), max_seq=40, max_images=1, engines=True)
    result = export("demo", tmp_path / "out", options)
    assert {engine.sidecar.spec.name for engine in result.built} == {
        "vision_encoder",
        "projector",
        "embed_tokens",
        "decoder",
    }
    assert result.plan.limits.max_images == 1
