"""The commands on an encoder-decoder (Florence-2): export, gate, what turns the gate red, answers, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.verify.mutate import Stored, corrupted_scale, damaged
from tests.zoo.encoder_decoder import ROWS, make_florence2_with_processor
from vlmexport import api
from vlmexport.cli.main import run
from vlmexport.model.load import load_vlm
from vlmexport.runtime.prompt import PromptBuilder, load_image
from vlmexport.verify.inputs import draw_picture

pytestmark = [pytest.mark.slow, pytest.mark.family]
Capture = pytest.CaptureFixture[str]
_ASKED = {"forced_bos_token_id": 0, "no_repeat_ngram_size": 3, "forced_eos_token_id": 1}
_END, _TOKENS = 1, 12
_INT8 = ("--quant", "rtn", "--bits", "8", "--group-size", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_florence2_with_processor(tmp_path_factory.mktemp("florence2"), **_ASKED)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    draw_picture(96, 64, 9).save(path)
    return path


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are random, so that 8 bits may lose more than the gate allows: what is judged here is the rest."""
    out = tmp_path_factory.mktemp("exports") / "int8"
    assert run(["onnx", "--model", str(model), "--out", str(out), *_INT8, "--no-verify", "-q"]) == 0
    return out


def test_the_gate_asks_what_an_encoder_decoder_has(exported: Path) -> None:
    report = api.verify_artifact(exported)
    assert report.status_of("lowering") == "passed", report.failures()
    assert not report.not_run()
    names = {check.name for check in report.checks}
    assert {"decoder/cache", "decoder/right_padding", "decoder/padding_guard", "decoder/decode"} <= names
    assert "decoder/prefill[tall]" in names and "decoder/prefill[two_images]" not in names
    assert len(report.series["decode_shipped_kl"]) > 1
    assert report.quantization.kl is not None and report.quantization.kl > 0


def _swapped_cross_keys(folder: Path) -> None:
    """The matrices that make the keys of layers 0 and 1 of the decoder's attention to the encoder."""
    name = "model.language_model.decoder.layers.{}.encoder_attn.k_proj.weight"
    with (
        Stored(folder / "encoder.onnx", name.format(0)) as one,
        Stored(folder / "encoder.onnx", name.format(1)) as other,
    ):
        one[...], other[...] = other.copy(), one.copy()


def test_swapped_cross_attention_keys_are_red(exported: Path, tmp_path: Path) -> None:
    report = api.verify_artifact(damaged(exported, tmp_path / "damaged", _swapped_cross_keys))
    failed = {check.name for check in report.failures()}
    assert {"decoder/prefill[square]", "decoder/decode", "decoder/ragged_batch"} <= failed
    assert "projector/features[square]" not in failed


def test_a_corrupted_scale_is_red(exported: Path, tmp_path: Path) -> None:
    report = api.verify_artifact(damaged(exported, tmp_path / "damaged", corrupted_scale))
    assert any(check.name.startswith("codes/") for check in report.failures())


def _generated(model: Path, picture: Path, prompt: str, **asked: Any) -> list[int]:
    """The answer by transformers, without the start token and what ends it."""
    vlm, inputs = load_vlm(str(model)), PromptBuilder(model).build([load_image(picture)], prompt)
    ids = torch.from_numpy(inputs.input_ids)
    pixels = torch.from_numpy(inputs.pixel_inputs["pixel_values"])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with torch.no_grad():
        made = vlm.model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=_TOKENS, **asked)
    answer: list[int] = made[0, 1:].tolist()
    return answer[: answer.index(_END)] if _END in answer else answer


def test_the_answer_is_that_of_transformers(model: Path, picture: Path, tmp_path: Path) -> None:
    """From float weights; the first token is forced, the last is, and no three tokens come twice."""
    out, answer = tmp_path / "floats", tmp_path / "answer.json"
    assert run(["onnx", "--model", str(model), "--out", str(out), "--quant", "none", "--no-verify", "-q"]) == 0
    asking = ["run", str(out), "--image", str(picture), "--max-new-tokens", str(_TOKENS), "--json", str(answer)]
    for prompt in ("<OD>", "<CAPTION>"):
        assert run([*asking, "--prompt", prompt]) == 0
        found = json.loads(answer.read_text())
        assert found["token_ids"] == _generated(model, picture, prompt)
        assert found["token_ids"][0] == _ASKED["forced_bos_token_id"]
        assert len(found["token_ids"]) == _TOKENS - 1
    free = _generated(model, picture, "<OD>", no_repeat_ngram_size=0, forced_bos_token_id=None)
    assert free != _generated(model, picture, "<OD>")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--prompt", "<OD> of cats"], r"processor refuses this prompt: Task token <OD> should be the only content"),
        (["--prompt", "<OD>", "--image", "{picture}"], "processor takes one picture with a prompt, not 2"),
    ],
)
def test_prompts_that_it_does_not_have_are_refused(
    more: list[str], told: str, exported: Path, picture: Path, capsys: Capture
) -> None:
    given = [word.format(picture=picture) for word in more]
    assert run(["run", str(exported), "--image", str(picture), *given]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_methods_that_calibrate_are_refused_and_inspect_says_what_goes(model: Path, capsys: Capture) -> None:
    assert run(["plan", "onnx", "--model", str(model), "-q"]) == 2
    assert "choose --quant rtn or hqq" in capsys.readouterr().err
    report = api.inspect_model(str(model))
    assert {target.name for target in report.targets if target.can_export} == {"cpu", "cuda"}
    assert "--quant rtn" in report.recipe.command and report.recipe.command.startswith("vlmexport onnx")
    assert set(report.tokens_per_image.values()) == {ROWS}
