"""Every kind of damage turns the gate red, and the failing check names the part. The hashes always agree."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import make_tiny
from tests.verify import mutate
from vlmexport import pipeline
from vlmexport.errors import ArtifactError
from vlmexport.plan import OnnxOptions
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.verify.run import verify_artifact

pytestmark = pytest.mark.slow

# The weights are random: nearly equal logits make 4 bits lose many top tokens, which the gate rightly reports.
HONEST_LOSS = {"quantization/kl", "quantization/top1", "quantization/perplexity_ratio"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these sizes need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def export(tiny_idefics3, tmp_path_factory):
    out = tmp_path_factory.mktemp("damaged") / "sound"
    options = OnnxOptions(scheme=QuantScheme(bits=4, group_size=32))
    pipeline.export_onnx(str(tiny_idefics3), out, options, force=False, verify=False, progress=SilentProgress())
    return out


def failures(report):
    """Failed checks by name, without the honest loss of random weights."""
    return {c.name: c for c in report.failures() if c.name not in HONEST_LOSS}


@pytest.fixture(scope="module")
def sound(export):
    return verify_artifact(export)


def test_the_sound_export_lowers_exactly(sound):
    assert failures(sound) == {}
    assert sound.status_of("lowering") == "passed"
    assert sound.not_run() == ()
    assert sound.lowering.max_abs_logit < 1e-4
    assert 0 < sound.lowering.kl < 1e-2


@pytest.mark.parametrize(
    ("damage", "part", "checks"),
    [
        (mutate.corrupted_scale, "decoder", {"codes/"}),
        (mutate.swapped_layers, "decoder", {"codes/"}),
        (mutate.swapped_parts, "vision_encoder", {"vision_encoder/signature"}),
        (mutate.swapped_parts, "projector", {"projector/signature"}),
        (mutate.crossed_cache, "decoder", {"decoder/decode", "decoder/cache", "decoder/ragged_batch"}),
        (mutate.dropped_output, "decoder", {"decoder/signature", "decoder/prefill[wide]"}),
        (mutate.wrong_normalisation, "processor", {"processor/pixels"}),
        (mutate.nan_in_projector, "projector", {"projector/features[wide]"}),
        (mutate.nan_in_decoder, "decoder", {"codes/", "decoder/prefill[wide]", "decoder/decode"}),
        (mutate.wrong_table_row, "embed_tokens", {"embed_tokens/table"}),
        (mutate.wrong_norm, "decoder", {"decoder/prefill[wide]", "decoder/one_token"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ""),
)
def test_damage_is_seen_and_named(export, tmp_path, damage, part, checks):
    report = verify_artifact(mutate.damaged(export, tmp_path / "export", damage))
    found = failures(report)
    assert report.status == "failed"
    for expected in checks:
        matching = [
            c for name, c in found.items() if name == expected or (expected == "codes/" and name.startswith(expected))
        ]
        assert matching, f"{expected} is not among the failed checks {sorted(found)}"
        assert matching[0].part == part


def test_a_corrupted_scale_names_the_weight(export, tmp_path):
    report = verify_artifact(mutate.damaged(export, tmp_path / "export", mutate.corrupted_scale))
    (check,) = [c for c in report.failures() if c.name.startswith("codes/")]
    assert "layers.0" in check.name
    assert check.value == 1.0
    assert "differ from what the quantizer chose" in check.reason


def test_a_changed_file_is_refused(export, tmp_path):
    copy = mutate.damaged(export, tmp_path / "export", lambda folder: None)
    mutate.corrupted_scale(copy)
    with pytest.raises(ArtifactError, match=r"decoder\.onnx_data was changed"):
        verify_artifact(copy)


def test_without_the_original_nothing_that_needs_it_is_passed(export, tmp_path):
    copy = mutate.damaged(export, tmp_path / "export", mutate.lost_source)
    report = verify_artifact(copy)
    assert report.status == "incomplete"
    missing = {c.name for c in report.not_run()}
    assert {"decoder/prefill", "quantization/kl", "vision_encoder/features", "processor/pixels"} <= missing
    assert all("could not be loaded" in c.reason for c in report.not_run())
    passed = {c.name for c in report.checks if c.status == "passed"}
    assert {"decoder/cache", "decoder/right_padding", "decoder/keep_last", "codes/all"} <= passed
    assert report.lowering.max_abs_logit is None
    assert report.quantization.accuracy is None


def test_a_crossed_cache_is_seen_even_without_the_original(export, tmp_path):
    def damage(folder):
        mutate.crossed_cache(folder)
        mutate.lost_source(folder)

    report = verify_artifact(mutate.damaged(export, tmp_path / "export", damage))
    assert "decoder/cache" in failures(report)


def test_another_model_is_not_the_source(export, tmp_path):
    other = make_tiny("idefics3", tmp_path / "other", seed=1)
    report = verify_artifact(export, model=str(other))
    found = failures(report)
    assert found["model/source"].part == "model"
    assert "model.safetensors" in found["model/source"].reason
    assert "decoder/prefill[wide]" in found or "vision_encoder/features[wide]" in found
