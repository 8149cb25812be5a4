"""Whole exports of the ``tensorrt`` layout in ONNX Runtime: they answer, the gate is green, and damage turns it red."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.verify import mutate
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.lower import emitter
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.package import package
from vlmexport.pipeline import load_and_split
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme
from vlmexport.runtime.generate import answer
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.target import load_target
from vlmexport.verify.inputs import draw_picture
from vlmexport.verify.questions import bundled_questions
from vlmexport.verify.run import verify_artifact
from vlmexport.verify.static_cache import STEPS

pytestmark = pytest.mark.slow

INT4 = QuantScheme(bits=4, group_size=32)
INT8 = QuantScheme(bits=8, group_size=PER_CHANNEL)
# The weights are random: nearly equal logits lose many top tokens to 4 bits, which the gate rightly reports.
HONEST_LOSS = {"quantization/kl", "quantization/top1", "quantization/perplexity_ratio"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these sizes need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def graphs_of(model: str, out: Path, scheme: QuantScheme | None, length: int) -> Artifact:
    """The graphs and the manifest of an export whose cache has `length` slots; no engines."""
    out.mkdir()
    options = OnnxOptions(target="tensorrt", layout="tensorrt", attention="static", cache_length=length, scheme=scheme)
    progress, target = SilentProgress(), load_target("tensorrt")
    vlm, split = load_and_split(model, False, progress)
    plan = plan_export(vlm, split, target, options)
    weights, calibrated = decoder_weights(vlm, split, plan.schemes, CalibrationOptions(), out, progress)
    emitted = emitter("onnx", "tensorrt")(vlm, split, plan, target, weights, out, progress)
    built = {"flavour": "", "version": "", "places": [], "reason": "none was asked for"}
    limits = {"max_batch": 1, "max_seq": length, "max_images": 4}
    facts = {"tensorrt": {"gpu": "a100-80", "limits": limits, "engines": [], "built": built}}
    return package(vlm, split, plan, target, emitted, out, calibrated, facts=facts)


@pytest.fixture(scope="module", params=[INT4, INT8, None], ids=["int4", "int8", "fp16"])
def tiny(request, tiny_llava, tmp_path_factory):
    return graphs_of(str(tiny_llava), tmp_path_factory.mktemp("tiny") / "export", request.param, 128)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    return graphs_of("demo", tmp_path_factory.mktemp("bundled") / "export", INT4, 128)


def failures(report):
    """Failed checks by name, without the honest loss of random weights."""
    return {c.name: c for c in report.failures() if c.name not in HONEST_LOSS}


def test_a_tiny_export_lowers_exactly_in_every_precision(tiny):
    report = verify_artifact(tiny.path)
    assert failures(report) == {}
    assert [c.name for c in report.not_run()] == ["engines/run"]
    names = {c.name: c for c in report.checks}
    assert {"decoder/exact_kl", "decoder/overfull", "model/dialect", "codes/all", "decoder/right_padding"} <= set(names)
    assert len(report.series["decode_exact_rel"]) == STEPS + 1
    assert report.lowering.max_abs_logit < 2e-2


@pytest.mark.parametrize(
    ("damage", "part", "checks"),
    [
        (mutate.swapped_parts, "vision_encoder", {"vision_encoder/signature"}),
        (mutate.crossed_cache, "decoder", {"decoder/decode", "decoder/cache", "decoder/ragged_batch"}),
        (mutate.dropped_output, "decoder", {"decoder/signature", "decoder/prefill[wide]"}),
        (mutate.nan_in_projector, "projector", {"projector/features[wide]"}),
        (mutate.wrong_table_row, "embed_tokens", {"embed_tokens/table"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ""),
)
def test_damage_is_seen_and_named(bundled, tmp_path, damage, part, checks):
    report = verify_artifact(mutate.damaged(bundled.path, tmp_path / "export", damage))
    found = failures(report)
    assert report.status == "failed"
    assert checks <= found.keys()
    assert {found[name].part for name in checks} == {part}


def test_a_corrupted_scale_names_its_weight(bundled, tmp_path):
    report = verify_artifact(mutate.damaged(bundled.path, tmp_path / "export", mutate.corrupted_scale))
    (check,) = [c for c in report.failures() if c.name.startswith("codes/")]
    assert "layers." in check.name
    assert "differ from what the quantizer chose" in check.reason


def test_without_the_original_what_needs_it_is_not_run(bundled, tmp_path):
    report = verify_artifact(mutate.damaged(bundled.path, tmp_path / "export", mutate.lost_source))
    idle = {c.name for c in report.not_run()}
    assert {"decoder/exact_kl", "decoder/decode", "engines/run"} <= idle
    assert {c.name: c.status for c in report.checks}["decoder/overfull"] == "passed"
    assert report.status == "incomplete"


def test_the_bundled_model_answers_its_questions(bundled):
    asked = bundled_questions(bundled.manifest.source["files"].values(), "sample")[:4]
    for question in asked:
        given = answer(open_artifact(bundled.path), list(question.images), question.text, threads=1)
        assert given.text in question.answers


def test_padding_pictures_change_nothing(bundled):
    inputs = PromptBuilder(bundled.path).build([draw_picture(64, 64, 1), draw_picture(64, 48, 2)], "What differs?")
    runner = OnnxRunner(bundled, threads=1)
    pixels = inputs.pixel_inputs
    padded = {name: np.concatenate([array, np.zeros_like(array[:, :1])], axis=1) for name, array in pixels.items()}
    assert padded["pixel_values"].shape[1] == pixels["pixel_values"].shape[1] + 1
    assert np.array_equal(runner.image_features(padded), runner.image_features(pixels))
