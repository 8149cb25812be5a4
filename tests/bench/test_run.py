"""The whole bench on a hand-built export: keys and sense, never speed."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.runtime.mock_export import mock_export
from vlmexport.bench import run
from vlmexport.bench.run import bench_artifact
from vlmexport.bench.worker import load_inputs, save_inputs
from vlmexport.cli.bench import print_bench
from vlmexport.errors import BadInputError, VlmExportError
from vlmexport.manifest import Artifact, FileRecord, write_manifest
from vlmexport.runtime.protocol import ModelInputs

KEYS = {
    "ttft_ms", "prefill_tok_s", "decode_tok_s", "p50_ms", "p95_ms", "p99_ms",
    "tok_s_per_gb", "peak_rss_bytes", "load_s", "size_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def export(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return mock_export(tiny_idefics3, tmp_path_factory.mktemp("mock") / "export")


@pytest.mark.slow
def test_report_has_the_documented_keys(export: Artifact) -> None:
    report = bench_artifact(export.path, tokens=3, rounds=1, threads=1)
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data["artifact"]) == KEYS
    assert data["runtime"] == "ONNX Runtime on the CPU"
    assert set(data["references"]) == {"pytorch_fp32", "pytorch_bf16"}
    assert all(set(values) == KEYS for values in data["references"].values())
    assert all(value > 0 for value in data["ratios"].values())
    assert data["ratios"]["decode_vs_pytorch_fp32"] == pytest.approx(
        data["artifact"]["decode_tok_s"] / data["references"]["pytorch_fp32"]["decode_tok_s"]
    )
    assert data["settings"]["prompt_tokens"] > 10


def test_references_are_left_out_when_the_original_is_gone(export: Artifact, tmp_path: Path) -> None:
    source = {**export.manifest.source, "model": str(tmp_path / "gone")}
    write_manifest(export.path, dataclasses.replace(export.manifest, source=source))
    report = bench_artifact(export.path, tokens=2, rounds=1, threads=1)
    write_manifest(export.path, export.manifest)
    assert report.references == {}
    assert report.ratios == {}
    assert "not measured" in report.settings["references"]


def test_a_tensorrt_export_says_what_ran_and_what_did_not(export: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring is left out: the layout and the files are what the report goes by."""
    files = {"decoder.onnx": 10, "engines/sm80/decoder.engine": 100, "triton/vlm/1/model.plan": 1000, "engines.json": 3}
    records = {name: FileRecord("0" * 64, size) for name, size in files.items()}
    manifest = dataclasses.replace(export.manifest, layout="tensorrt", files=records)
    monkeypatch.setattr(run, "open_artifact", lambda path: Artifact(path, manifest))
    monkeypatch.setattr(run, "_contenders", lambda *args: ({}, "none"))
    monkeypatch.setattr(run, "_measure", lambda *args: ({"artifact": {"decode_tok_s": 2.0}}, 7))
    data = bench_artifact(export.path).to_dict()
    assert data["runtime"] == "ONNX Runtime on the CPU; no engine was run"
    assert data["artifact"]["size_bytes"] == 13
    console = Console(file=io.StringIO(), width=200)
    print_bench(data, console)
    assert "artifact: ONNX Runtime on the CPU; no engine was run\n" in console.file.getvalue()


def test_a_given_model_must_be_there(export: Artifact, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="gone"):
        bench_artifact(export.path, model=str(tmp_path / "gone"), tokens=2, rounds=1)


def test_a_broken_part_is_named_by_its_worker(export: Artifact) -> None:
    part = export.part_path("projector")
    good = part.read_bytes()
    part.write_bytes(good[:100])
    write_manifest(export.path, export.manifest)
    with pytest.raises(VlmExportError, match=r"projector: projector\.onnx does not load") as caught:
        bench_artifact(export.path, tokens=2, rounds=1)
    part.write_bytes(good)
    write_manifest(export.path, export.manifest)
    assert caught.value.exit_code == 3


def test_inputs_survive_the_file(tmp_path: Path) -> None:
    inputs = ModelInputs(np.array([[1, 2]]), {"pixel_values": np.ones((1, 2, 3), np.float32)})
    save_inputs(inputs, tmp_path / "i.npz")
    again = load_inputs(tmp_path / "i.npz")
    np.testing.assert_array_equal(again.input_ids, inputs.input_ids)
    np.testing.assert_array_equal(again.pixel_inputs["pixel_values"], inputs.pixel_inputs["pixel_values"])
