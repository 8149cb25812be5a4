"""The whole bench on a hand-built export: keys and sense, never speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.mock_export import mock_export
from vlmexport.bench.run import bench_artifact
from vlmexport.bench.worker import load_inputs, save_inputs
from vlmexport.errors import BadInputError, VlmExportError
from vlmexport.manifest import Artifact, write_manifest
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
