"""The INT8 cache's gate: green for a sound export, red for scales and codes that are not the right ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.verify import mutate
from vlmexport import pipeline
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.errors import ArtifactError
from vlmexport.manifest import Artifact, open_artifact, write_manifest
from vlmexport.model.kv import KVGeometry
from vlmexport.plan import OnnxOptions
from vlmexport.progress import SilentProgress
from vlmexport.verify.gates import Gate
from vlmexport.verify.kv_cache import CHECKS, FollowingCache, LayerScales, check_scales, read_scales
from vlmexport.verify.run import verify_artifact

HONEST_LOSS = {"quantization/kl", "quantization/top1", "quantization/perplexity_ratio"}


@pytest.fixture(scope="module")
def export(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("kv") / "export"
    options = OnnxOptions(scheme=None, kv_cache="int8")
    calibration = CalibrationOptions(samples=4)
    return pipeline.export_onnx(
        str(tiny_idefics3),
        out,
        options,
        calibration=calibration,
        force=False,
        verify=False,
        progress=SilentProgress(),
    ).artifact


def geometry(artifact: Artifact) -> KVGeometry:
    kv = artifact.manifest.model["kv"]
    return KVGeometry(kv["layers"], kv["heads"], kv["head_dim"])


def scale_faults(artifact: Artifact) -> str:
    gate = Gate()
    check_scales(gate, artifact, geometry(artifact))
    (check,) = gate.checks
    assert check.name == "decoder/kv_scales" and check.part == "decoder"
    return check.reason if check.status == "failed" else ""


def changed_scale(folder: Path) -> None:
    """One channel of layer 1's keys gets another scale."""
    _change(folder, "kv_cache.1.key_scale", lambda values: values.reshape(-1).__setitem__(3, values.max() * 2))


def swapped_scales(folder: Path) -> None:
    """Layer 0 quantizes keys with the scales of the values, and values with those of the keys."""
    file = folder / mutate.DECODER
    model = onnx.load(file, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    node.input[12], node.input[13] = node.input[13], node.input[12]
    onnx.save(model, file)


def negative_scale(folder: Path) -> None:
    _change(folder, "kv_cache.0.value_scale", lambda values: values.reshape(-1).__setitem__(0, -1.0))


def lost_settings(folder: Path) -> None:
    file = folder / mutate.DECODER
    model = onnx.load(file, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    kept = [a for a in node.attribute if a.name != "v_quant_type"]
    del node.attribute[:]
    node.attribute.extend(kept)
    onnx.save(model, file)


def _change(folder: Path, name: str, change: object) -> None:
    file = folder / mutate.DECODER
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)  # type: ignore[operator]
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, file)


@pytest.mark.slow
def test_the_manifest_tells_of_the_cache(export: Artifact) -> None:
    kv = export.manifest.model["kv"]
    assert (kv["dtype"], kv["granularity"]) == ("int8", "per_channel")
    assert kv["bytes_per_token"] == 2 * kv["layers"] * kv["heads"] * kv["head_dim"]
    assert export.manifest.calibration is not None
    assert export.manifest.calibration["kv_cache"]["samples"] == 4
    assert scale_faults(export) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (changed_scale, "differ from the chosen ones"),
        (swapped_scales, "differ from the chosen ones"),
        (negative_scale, "kv_cache.0.value_scale must be positive float32"),
        (lost_settings, "layer 0: the operator says"),
    ],
)
def test_wrong_scales_are_faults(export: Artifact, tmp_path: Path, damage: object, reason: str) -> None:
    folder = mutate.damaged(export.path, tmp_path / "export", damage)  # type: ignore[arg-type]
    assert reason in scale_faults(open_artifact(folder))


@pytest.mark.slow
def test_a_layer_without_scales_is_a_fault(export: Artifact) -> None:
    with pytest.raises(ArtifactError, match="quantized caches of the layers"):
        read_scales(export.path / "decoder.onnx", dataclasses.replace(geometry(export), layers=99))


@pytest.mark.slow
def test_the_whole_gate(export: Artifact, tmp_path: Path) -> None:
    report = verify_artifact(export.path)
    assert {c.name for c in report.failures()} <= HONEST_LOSS
    names = {c.name.split("[")[0] for c in report.checks}
    assert {*CHECKS, "decoder/kv_scales"} <= names
    assert all(c.status == "passed" for c in report.checks if c.name.startswith("decoder/kv_"))
    damaged = mutate.damaged(export.path, tmp_path / "export", changed_scale)
    failures = {c.name for c in verify_artifact(damaged).failures()}
    assert "decoder/kv_scales" in failures


@pytest.mark.slow
def test_without_the_original_the_cache_is_not_judged_and_says_so(export: Artifact, tmp_path: Path) -> None:
    report = verify_artifact(mutate.damaged(export.path, tmp_path / "export", mutate.lost_source))
    status = {c.name: c.status for c in report.checks}
    assert status["decoder/kv_scales"] == "passed"
    assert {status[name] for name in CHECKS} == {"not_run"}


def following(states: torch.Tensor, codes: torch.Tensor, room: float = 1e-3) -> tuple[torch.Tensor, FollowingCache]:
    scale = torch.full((1, 1, 1, states.shape[-1]), 0.5)
    cache = FollowingCache([LayerScales(scale, scale)], room)
    cache.codes = [(codes, codes)]
    keys, values = cache.update(states, states, 0)
    assert torch.equal(keys, values)
    return keys[0, 0], cache


def test_pytorch_follows_a_code_on_either_side_of_a_tie() -> None:
    states = torch.tensor([[[[0.25, 0.25, 100.0, -0.2501]]]])  # half a step, twice; beyond the range; a hair past
    keys, cache = following(states, torch.tensor([[[[0, 1, 127, 0]]]], dtype=torch.int8))
    assert keys.tolist() == [[0.0, 0.5, 63.5, 0.0]]
    assert 0 < cache.furthest < 1e-3


def test_pytorch_does_not_follow_a_wrong_code_and_says_how_far_it_is() -> None:
    keys, cache = following(torch.tensor([[[[0.1, 2.0]]]]), torch.tensor([[[[1, 4]]]], dtype=torch.int8))
    assert keys.tolist() == [[0.0, 2.0]]
    assert cache.furthest == pytest.approx(0.3, abs=1e-6)
    assert np.isfinite(cache.furthest)


@pytest.mark.slow
def test_a_manifest_of_another_digest_is_a_fault(export: Artifact, tmp_path: Path) -> None:
    folder = mutate.damaged(export.path, tmp_path / "export", lambda _: None)
    artifact = open_artifact(folder)
    kv = {**artifact.manifest.model["kv"], "scales_digest": "0" * 64}
    changed = dataclasses.replace(artifact.manifest, model={**artifact.manifest.model, "kv": kv})
    assert "digest of the manifest" in scale_faults(write_manifest(folder, changed))
