"""`--quant auto`: limits that are met, limits that cannot be, and what an export makes of the plan."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.calibrate.auto_comparison import Comparison
from tests.tiny import make_tiny
from vlmexport import api
from vlmexport.calibrate import auto
from vlmexport.calibrate.auto import settle_bits, settle_choice
from vlmexport.calibrate.candidates import Candidates, Planner
from vlmexport.calibrate.effects import UnitEffect
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.checkpoint_plan import CheckpointOptions, plan_checkpoint
from vlmexport.demo import model_dir
from vlmexport.demo.variants import make_outlier_variant
from vlmexport.errors import BadInputError
from vlmexport.manifest import open_artifact
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions, WeightPlan, plan_export
from vlmexport.plan_file import AutoLimit, load_plan_file
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.split.capture import split_model
from vlmexport.target import load_target

RTN = make_scheme("rtn", 4)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "HELD_OUT_SAMPLES", 8)


def plan_llava(folder: Path, limit: AutoLimit, work: Path, base: QuantScheme = RTN) -> tuple[OnnxOptions, int]:
    vlm = load_vlm(str(folder))
    split, target = split_model(vlm), load_target("cpu")
    options = OnnxOptions(scheme=base, choice=limit)
    few = CalibrationOptions(samples=8)
    settled, plan = settle_bits(vlm, split, target, options, few, work, SilentProgress())
    assert plan is not None
    assert settled.choice is None
    plan.check(vlm)
    size = plan_export(vlm, split, target, settled).bytes_after
    assert size == plan.measured["bytes"]
    return settled, size


@pytest.mark.usefixtures("few_samples")
def test_size_is_met_and_used(tiny_llava: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    split, target = split_model(vlm), load_target("cpu")
    smallest = plan_export(vlm, split, target, OnnxOptions(scheme=RTN)).bytes_after
    largest = plan_export(vlm, split, target, OnnxOptions(scheme=None)).bytes_after
    room = (smallest + largest) // 2
    settled, size = plan_llava(tiny_llava, AutoLimit(max_size=room), tmp_path)
    assert 0.9 * room < size <= room
    assert settled.scheme is not None
    assert 8 in {s.bits for s in settled.scheme.overrides.values()}


def smallest_of(error: pytest.ExceptionInfo[BadInputError]) -> int:
    found = re.search(r"weights take (\d+) bytes", str(error.value))
    assert found is not None
    return int(found[1])


@pytest.mark.usefixtures("few_samples")
def test_the_smallest_size_that_an_impossible_limit_is_told_can_be_met(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"--max-size 1 bytes cannot be met") as error:
        plan_llava(tiny_llava, AutoLimit(max_size=1), tmp_path)
    smallest = smallest_of(error)
    assert plan_llava(tiny_llava, AutoLimit(max_size=smallest), tmp_path)[1] == smallest
    with pytest.raises(BadInputError, match=f"take {smallest} bytes"):
        plan_llava(tiny_llava, AutoLimit(max_size=smallest - 1), tmp_path)


@pytest.mark.usefixtures("few_samples")
def test_weights_that_read_one_input_are_treated_alike(tiny_llava: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    split, target = split_model(vlm), load_target("cpu")
    sizes = [plan_export(vlm, split, target, OnnxOptions(scheme=s)).bytes_after for s in (RTN, None)]
    settled, _ = plan_llava(tiny_llava, AutoLimit(max_size=sum(sizes) // 2), tmp_path)
    schemes = plan_export(vlm, split, target, settled).schemes
    for sisters in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for first in [n for n in plan_export(vlm, split, target, OnnxOptions()).schemes if sisters[0] in n]:
            assert len({str(schemes.get(first.replace(sisters[0], sister))) for sister in sisters}) == 1
    assert len({str(scheme) for scheme in schemes.values()}) > 1


def test_prompt_matrices_count(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "HELD_OUT_SAMPLES", 2)
    vlm = load_vlm(str(tiny_llava))
    split, target = split_model(vlm), load_target("cpu")
    options = OnnxOptions(scheme=RTN, prefill="int8", choice=AutoLimit(max_size=1))
    few = CalibrationOptions(samples=2)
    with pytest.raises(BadInputError, match="cannot be met") as error:
        settle_bits(vlm, split, target, options, few, tmp_path, SilentProgress())
    smallest = dataclasses.replace(options, choice=AutoLimit(max_size=smallest_of(error)))
    settled, plan = settle_bits(vlm, split, target, smallest, few, tmp_path, SilentProgress())
    export = plan_export(vlm, split, target, settled)
    assert export.prefill_bytes > 0
    assert plan is not None
    assert plan.measured["bytes"] == export.bytes_after + export.prefill_bytes == smallest_of(error)


@pytest.mark.usefixtures("few_samples")
def test_a_misleading_estimate_does_not_beat_uniform(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = auto.unit_effects

    def wrong(*args: Any) -> list[UnitEffect]:
        return [dataclasses.replace(effect, kl=1 / effect.kl) for effect in right(*args)]

    monkeypatch.setattr(auto, "unit_effects", wrong)
    vlm = load_vlm(str(tiny_llava))
    split, target = split_model(vlm), load_target("cpu")
    size = plan_export(vlm, split, target, OnnxOptions(scheme=RTN)).bytes_after
    options, few = OnnxOptions(scheme=RTN, choice=AutoLimit(max_size=size)), CalibrationOptions(samples=8)
    _, plan = settle_bits(vlm, split, target, options, few, tmp_path, SilentProgress())
    assert plan is not None
    assert plan.measured["kl"] == plan.measured["uniform"]["4 bits g32"]["kl"]
    assert plan.scheme == RTN


@pytest.mark.usefixtures("few_samples")
def test_a_smaller_divergence_costs_more_bytes(tiny_llava: Path, tmp_path: Path) -> None:
    sizes = [plan_llava(tiny_llava, AutoLimit(max_kl=kl), tmp_path)[1] for kl in (100.0, 1e-3, 1e-9)]
    assert sizes == sorted(set(sizes))
    settled, _ = plan_llava(tiny_llava, AutoLimit(max_kl=100.0), tmp_path)
    assert settled.scheme is not None
    assert {s.bits for s in settled.scheme.overrides.values()} == {4}
    assert settled.keep == ()
    settled, _ = plan_llava(tiny_llava, AutoLimit(max_kl=1e-9), tmp_path)
    assert "language_model.lm_head.weight" in settled.keep or "lm_head.weight" in settled.keep


@pytest.mark.usefixtures("few_samples")
def test_a_limit_below_what_the_choices_give_is_refused(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = auto.find_candidates

    def without_floats(planner: Planner, base: QuantScheme) -> Candidates:
        found = every(planner, base)  # as in a format that cannot keep weights: 8 bits are the best there is
        return dataclasses.replace(found, every=found.every[:-1])

    monkeypatch.setattr(auto, "find_candidates", without_floats)
    with pytest.raises(BadInputError, match=r"--max-kl 1e-12 cannot be met: the smallest divergence"):
        plan_llava(tiny_llava, AutoLimit(max_kl=1e-12), tmp_path)


@pytest.mark.usefixtures("few_samples")
def test_packed_experts_are_weights_like_others(tmp_path: Path) -> None:
    text = {"num_local_experts": 3, "num_experts_per_tok": 2}
    sizes = {"hidden": 64, "head_dim": 16, "intermediate": 64, "layers": 1, "vision_layers": 1}
    vlm = load_vlm(str(make_tiny("llava", tmp_path / "moe", text_type="mixtral", text=text, dtype="float32", **sizes)))
    split = split_model(vlm)

    def planner(scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
        return plan_checkpoint(vlm, split, CheckpointOptions("compressed-tensors", scheme, keep)).weights

    room = sum(sum(w.bytes_after for w in planner(make_scheme("rtn", bits), ())) for bits in (4, 8)) // 2
    few, limit = CalibrationOptions(samples=8), AutoLimit(max_size=room)
    plan = settle_choice(vlm, split, planner, RTN, limit, few, tmp_path / "work", SilentProgress())
    stored = {w.name: w for w in planner(plan.scheme, plan.keep)}
    assert plan.measured["bytes"] == sum(w.bytes_after for w in stored.values()) <= room
    assert 0 < plan.measured["kl"] == pytest.approx(plan.estimated["kl"], rel=0.5)
    experts = [w for w in stored.values() if w.scheme is not None and ".experts." in w.name]
    assert len(experts) == 2


def test_a_quantized_checkpoint_keeps_its_codes(tiny_llava: Path, tmp_path: Path) -> None:
    vlm = dataclasses.replace(load_vlm(str(tiny_llava)), quantized=object())  # type: ignore[arg-type]
    options = OnnxOptions(choice=AutoLimit(max_kl=1.0))
    with pytest.raises(BadInputError, match="is quantized already and keeps its codes"):
        settle_bits(
            vlm, split_model(vlm), load_target("cpu"), options, CalibrationOptions(), tmp_path, SilentProgress()
        )


@pytest.mark.slow
@pytest.mark.usefixtures("few_samples")
def test_a_plan_is_exported_with_its_bits_and_passes_the_gate(tmp_path: Path) -> None:
    options = OnnxOptions(scheme=RTN, choice=AutoLimit(max_size=5_400_000))
    first = api.export_onnx("demo", tmp_path / "auto", options)
    assert first.report is not None
    assert first.report.status == "passed"
    bits = {member.name: record.bits for record in first.artifact.manifest.quantized for member in record.members}
    assert set(bits.values()) == {4, 8}
    plan = load_plan_file(tmp_path / "auto" / "quantization_plan.json")
    second = api.export_onnx("demo", tmp_path / "again", OnnxOptions(choice=plan), verify=False)
    graphs = [file for file in first.artifact.manifest.files if file.endswith((".onnx", "_data"))]
    found = open_artifact(tmp_path / "again", check_hashes=True).manifest.files
    assert graphs
    assert all(found[file].sha256 == first.artifact.manifest.files[file].sha256 for file in graphs)
    assert second.quant_plan == plan
    shown = api.plan_onnx("demo", OnnxOptions(choice=plan)).to_dict()
    assert shown["bytes_after"] == plan.measured["bytes"]
    assert json.dumps(shown)


@pytest.mark.slow
@pytest.mark.usefixtures("few_samples")
def test_a_calibrated_choice_is_measured_with_its_own_codes(tmp_path: Path) -> None:
    work = tmp_path / "work"
    settled, _ = plan_demo(AutoLimit(max_kl=0.01), work)
    assert settled.scheme is not None
    assert settled.scheme.algorithm == "awq+gptq"
    steps = {file: file.stat().st_mtime_ns for file in work.glob("step-*")}
    assert steps
    vlm = load_vlm("demo")
    split = split_model(vlm)
    schemes = plan_export(vlm, split, load_target("cpu"), settled).schemes
    decoder_weights(vlm, split, schemes, CalibrationOptions(samples=32), work, SilentProgress())
    found = {file: file.stat().st_mtime_ns for file in work.glob("step-*")}
    assert found == steps, "the export does not calibrate again"
    assert not list(work.glob("trial-*"))


def plan_demo(limit: AutoLimit, work: Path) -> tuple[OnnxOptions, float]:
    vlm = load_vlm("demo")
    options = OnnxOptions(choice=limit)
    few = CalibrationOptions(samples=32)
    settled, plan = settle_bits(vlm, split_model(vlm), load_target("cpu"), options, few, work, SilentProgress())
    assert plan is not None
    assert limit.max_kl is None or plan.measured["upper"] <= limit.max_kl
    return settled, plan.measured["kl"]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "share"), [("bundled", 0.7), ("outlier", 0.8)])
def test_auto_beats_uniform_int4_at_equal_size_and_keeps_its_limit(variant: str, share: float, tmp_path: Path) -> None:
    """On samples that chose nothing, for what is exported by default and for rounding to nearest."""
    model = "demo" if variant == "bundled" else str(make_outlier_variant(model_dir(), tmp_path / "outlier"))
    compared = Comparison(model)
    for base in (RTN, make_scheme("awq+gptq", 4)):
        even = compared.uniform(base)
        _, best = compared.auto(base, AutoLimit(max_size=even.size))
        assert best.size <= even.size
        assert best.found.kl < share * even.found.kl
    limit = 0.3 * compared.uniform(RTN).found.kl
    plan, kept = compared.auto(RTN, AutoLimit(max_kl=limit))
    assert kept.found.kl <= limit
    assert plan.measured["upper"] <= limit
