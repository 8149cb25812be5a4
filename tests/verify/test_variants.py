"""On the trained model: the gate tells a bad quantization from a good one, and never calls it a lowering error."""

from __future__ import annotations

import json

import onnxruntime
import pytest
import torch

from vlmexport import demo, pipeline
from vlmexport.demo.variants import make_outlier_variant, make_range_variant
from vlmexport.plan import OnnxOptions
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.target import load_target
from vlmexport.verify.run import verify_artifact

pytestmark = pytest.mark.slow

COARSE = OnnxOptions(scheme=QuantScheme(bits=4, group_size=128))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than this model needs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Every 13th frozen question, as a user's own file."""
    file = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    rows = [
        {"image": str(q.image), "question": q.question, "answers": list(q.answers), "task": q.task}
        for q in demo.frozen_questions()[::13]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def judged(model, out, samples):
    pipeline.export_onnx(str(model), out, COARSE, force=False, verify=False, progress=SilentProgress())
    return verify_artifact(out, samples=samples)


@pytest.fixture(scope="module")
def plain(samples, tmp_path_factory):
    return judged(demo.model_dir(), tmp_path_factory.mktemp("plain") / "export", samples)


@pytest.fixture(scope="module")
def outliers(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outliers")
    variant = make_outlier_variant(demo.model_dir(), folder / "model")
    return judged(variant, folder / "export", samples)


def test_both_exports_lower_exactly(plain, outliers):
    assert plain.status_of("lowering") == "passed"
    assert outliers.status_of("lowering") == "passed"


def test_outliers_under_plain_rounding_fail_the_quantization_question(plain, outliers):
    failed = {c.name for c in outliers.failures()}
    assert {"quantization/kl", "quantization/top1"} <= failed
    assert outliers.quantization.kl > 10 * plain.quantization.kl


def test_the_variant_is_the_same_function(plain, outliers):
    assert outliers.quantization.reference_accuracy == plain.quantization.reference_accuracy


def test_accuracy_is_reported_by_task(plain):
    assert sum(t.questions for t in plain.tasks) == 100
    assert plain.quantization.accuracy is not None


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_activations_beyond_float16_are_right_in_every_profile(tmp_path, target):
    variant = make_range_variant(demo.model_dir(), tmp_path / "model")
    result = pipeline.export_onnx(
        str(variant),
        tmp_path / "export",
        OnnxOptions(target=target, scheme=QuantScheme()),
        force=False,
        verify=True,
        progress=SilentProgress(),
    )
    # Without a GPU the cuda profile's provider was not run, and the report says so; everything else is green.
    here = load_target(target).provider in onnxruntime.get_available_providers()
    assert not result.report.failures()
    assert result.report.status == ("passed" if here else "incomplete")


def test_without_questions_drawn_pictures_tell_good_from_bad(tmp_path):
    variant = make_outlier_variant(demo.model_dir(), tmp_path / "model")
    coarse = pipeline.export_onnx(
        str(variant), tmp_path / "coarse", COARSE, force=False, verify=True, progress=SilentProgress()
    )
    fine = pipeline.export_onnx(
        str(variant),
        tmp_path / "fine",
        OnnxOptions(scheme=QuantScheme()),
        force=False,
        verify=True,
        progress=SilentProgress(),
    )
    assert {c.part for c in coarse.report.failures()} == {"model"}
    assert coarse.artifact.path.name == "coarse.failed"
    assert fine.report.status == "passed"
