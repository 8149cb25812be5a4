"""What ``vlmexport quantize`` writes is imported with identical digests: emitters and importers share no code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmexport.checkpoint_plan import CheckpointOptions
from vlmexport.model.load import load_vlm
from vlmexport.pipeline import export_onnx
from vlmexport.plan import OnnxOptions
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize_pipeline import quantize_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method", "bits", "symmetric"),
    [
        ("gptq", "rtn", 4, True),
        ("gptq", "rtn", 3, False),
        ("awq", "rtn", 4, True),
        ("awq", "hqq", 4, False),
        ("compressed-tensors", "rtn", 4, True),
        ("compressed-tensors", "rtn", 3, False),
        ("compressed-tensors", "fp8", None, None),
        ("bnb-nf4", "nf4", None, None),
        ("bnb-nf4", "nf4:nested", None, None),
    ],
)
def test_digests_survive(
    tiny_idefics3: Path, tmp_path: Path, layout: str, method: str, bits: int | None, symmetric: bool | None
) -> None:
    options = CheckpointOptions(layout, make_scheme(method, bits, None, symmetric))
    result = quantize_checkpoint(
        str(tiny_idefics3), tmp_path / "q", options, force=False, verify=False, progress=SilentProgress()
    )
    records = json.loads((result.path / "vlmexport_quantization.json").read_text())["quantized"]
    written = {record["name"]: record["digest"] for record in records}
    kept = load_vlm(str(result.path)).quantized
    assert kept is not None
    assert written
    assert written == {name: codes.digest() for name, codes in kept.codes.items()}


@pytest.mark.slow
def test_an_import_of_the_demo_passes_the_gate_with_the_same_digests(tmp_path: Path) -> None:
    options = CheckpointOptions("awq", make_scheme("rtn", 4, 32, False))
    progress = SilentProgress()
    source = quantize_checkpoint("demo", tmp_path / "q", options, force=False, verify=False, progress=progress).path
    result = export_onnx(str(source), tmp_path / "onnx", OnnxOptions(), force=False, verify=True, progress=progress)
    assert result.report is not None
    assert result.report.status == "passed", result.report.failures()
    records = json.loads((source / "vlmexport_quantization.json").read_text())["quantized"]
    written = {record["name"]: record["digest"] for record in records}
    exported = {m.name: m.digest for record in result.artifact.manifest.quantized for m in record.members}
    assert exported == written
    assert not (result.artifact.path / "vlmexport_quantization.json").exists()
