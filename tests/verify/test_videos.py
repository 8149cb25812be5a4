"""The gate's prompt with a video, by a Qwen processor with a stand-in for its video half."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from tests.families.tiny_qwen import make_tiny_qwen
from tests.families.video_processor import composed
from vlmexport import api
from vlmexport.cli.main import run
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.model.videos import VideoSpec
from vlmexport.plan import OnnxOptions
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.target import load_target
from vlmexport.verify import parts
from vlmexport.verify.gates import Gate
from vlmexport.verify.prompts import Prompts, build_prompts
from vlmexport.verify.reference import Reference, load_reference
from vlmexport.verify.videos import check_video, drawn_video, video_prompts

pytestmark = pytest.mark.slow
FLOATS = OnnxOptions(scheme=None, encoder_dtype="fp32", decoder_dtype="fp32")
RULE = VideoSpec(6, per_second=4.0)


@pytest.fixture(scope="module", autouse=True)
def processors() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoProcessor, "from_pretrained", staticmethod(composed))
        yield


@pytest.fixture(scope="module")
def artifact(processors: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    base = tmp_path_factory.mktemp("video")
    source = make_tiny_qwen("qwen2_5_vl", base / "model", text={"num_hidden_layers": 2}, vision={"depth": 2})
    return api.export_onnx(str(source), base / "export", FLOATS, verify=False).artifact


@pytest.fixture(scope="module")
def reference(artifact: Artifact) -> Reference:
    return load_reference(artifact.manifest.source["model"])


def with_rule(artifact: Artifact, rule: VideoSpec | None) -> Artifact:
    """The export with another rule of videos in its manifest."""
    model = artifact.manifest.model
    merge = {**model["merge"], "video": None if rule is None else dataclasses.asdict(rule)}
    return dataclasses.replace(
        artifact, manifest=dataclasses.replace(artifact.manifest, model={**model, "merge": merge})
    )


def judged(artifact: Artifact, reference: Reference) -> dict[str, str]:
    """Status by name of the checks of the prompt with a video, before the decoder."""
    gate = Gate()
    prompts = build_prompts(gate, artifact, reference)
    video = [prompt for prompt in prompts.probes if prompt.name == "video"]
    limits, runner = load_target(artifact.manifest.target).parity, OnnxRunner(artifact, threads=1)
    wanted = {p.name: parts.merged_input(reference.runner, p.reference) for p in video if p.reference}
    check_video(gate, video, reference, wanted)
    parts.check_processor(gate, video)
    parts.check_vision(gate, video, runner, reference.runner, limits)
    parts.check_merged(gate, video, runner, wanted, limits)
    return {check.name: check.status for check in gate.checks}


def test_every_step_before_the_decoder_is_judged(artifact: Artifact, reference: Reference) -> None:
    assert artifact.manifest.model["merge"]["video"] == dataclasses.asdict(RULE)
    found = judged(artifact, reference)
    names = ("model/video", "vision_encoder/features", "projector/features", "model/merged_inputs")
    assert {f"{name}[video]" for name in names} <= found.keys()
    assert {"model/video[video]:position_ids", "model/merged_inputs[video]:position_ids"} <= found.keys()
    assert set(found.values()) == {"passed"}


def test_a_wrong_rule_in_the_manifest_turns_it_red(artifact: Artifact, reference: Reference) -> None:
    found = judged(with_rule(artifact, dataclasses.replace(RULE, per_second=20.0)), reference)
    assert [name for name, status in found.items() if status == "failed"] == ["model/merged_inputs[video]:position_ids"]


def test_a_wrong_rule_of_the_reference_turns_it_red(
    artifact: Artifact, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(reference.runner.merge_spec, video=dataclasses.replace(RULE, per_second=20.0))
    monkeypatch.setattr(reference.runner, "merge_spec", wrong)
    failed = [name for name, status in judged(artifact, reference).items() if status == "failed"]
    assert "model/video[video]:position_ids" in failed
    encode = reference.runner.image_features
    monkeypatch.setattr(reference.runner, "image_features", lambda pixels: encode(pixels)[::-1])
    assert judged(artifact, reference)["model/video[video]"] == "failed"


def prompts_of(artifact: Artifact, reference: Reference | None) -> tuple[Gate, Prompts]:
    gate = Gate()
    return gate, build_prompts(gate, artifact, reference)


def test_without_a_rule_there_is_no_such_prompt(artifact: Artifact, reference: Reference) -> None:
    gate, prompts = prompts_of(with_rule(artifact, None), reference)
    assert "video" not in {prompt.name for prompt in prompts.probes}
    assert gate.checks == []


def test_what_cannot_be_made_is_not_run(
    artifact: Artifact, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_video(folder: Any, **more: Any) -> Any:
        processor = composed(folder, **more)
        processor.video_processor = None
        return processor

    monkeypatch.setattr(AutoProcessor, "from_pretrained", staticmethod(without_video))
    for known in (reference, None):
        gate, prompts = prompts_of(artifact, known)
        assert "video" not in {prompt.name for prompt in prompts.probes}
        (check,) = gate.checks
        assert (check.name, check.status) == ("processor/probe[video]", "not_run")
        assert check.reason.startswith("no prompt with a video can be made here: the model's processor takes no videos")


def test_a_rule_that_the_original_has_not_is_a_fault(
    artifact: Artifact, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = dataclasses.replace(reference.runner.merge_spec, video=None)
    monkeypatch.setattr(reference.runner, "merge_spec", none)
    gate, prompts = prompts_of(artifact, None)
    gate.checks.clear()
    assert video_prompts(gate, artifact, (prompts.exported, prompts.exported), reference) == []
    assert [(check.name, check.status) for check in gate.checks] == [("processor/probe[video]", "failed")]


def test_the_whole_gate_passes_and_run_takes_a_video(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = api.verify_artifact(artifact.path)
    assert report.failures() == ()
    passed = {check.name for check in report.checks if check.status == "passed"}
    assert {"model/video[video]", "decoder/prefill[video]", "decoder/decode", "processor/pixels"} <= passed
    frames = tmp_path / "frames"
    frames.mkdir()
    for index, frame in enumerate(drawn_video().frames):
        frame.save(frames / f"{index}.png")
    answer = ["run", str(artifact.path), "--prompt", "What?", "--max-new-tokens", "4", "--json", "-"]
    assert run([*answer, "--video", str(frames), "--fps", "2"]) == 0
    with_video = capsys.readouterr().out
    assert run([*answer]) == 0
    assert capsys.readouterr().out != with_video
    assert open_artifact(artifact.path).manifest.model["merge"]["video"]["per_second"] == 4.0
