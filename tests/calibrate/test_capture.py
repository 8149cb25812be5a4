"""Captured decoder arguments: padding, images, answers, and that they are the real forward's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmexport.calibrate.capture import Batch, capture_batches, token_shares
from vlmexport.calibrate.conversation import Turn
from vlmexport.calibrate.dataset import CalibrationSample, load_samples
from vlmexport.calibrate.recipe import Recipe
from vlmexport.errors import BadInputError
from vlmexport.model.load import VLM, load_vlm

RECIPE = Recipe("test", samples=6, batch_size=4)


@pytest.fixture(scope="module")
def demo() -> VLM:
    return load_vlm("demo")


@pytest.fixture(scope="module")
def samples() -> tuple[CalibrationSample, ...]:
    return load_samples(RECIPE).samples


def alone(vlm: VLM, samples: Any, **changes: Any) -> list[Batch]:
    return list(capture_batches(vlm, samples, Recipe("test", batch_size=1, **changes)))


def test_a_padded_batch_holds_what_single_samples_give(demo: VLM, samples: tuple[CalibrationSample, ...]) -> None:
    batches = list(capture_batches(demo, samples, RECIPE))
    assert [b.valid.shape[0] for b in batches] == [4, 2]
    singles = alone(demo, samples)
    rows = [(batch, row) for batch in batches for row in range(batch.valid.shape[0])]
    assert len({single.valid.shape[1] for single in singles}) > 1, "the samples must differ in length"
    for (batch, row), single in zip(rows, singles, strict=True):
        valid = batch.valid[row]
        assert single.valid.all()
        assert torch.equal(batch.input_ids[row][valid], single.input_ids[0])
        assert torch.equal(batch.image[row][valid], single.image[0])
        assert torch.equal(batch.answer[row][valid], single.answer[0])
        found, wanted = batch.kwargs["inputs_embeds"][row][valid], single.kwargs["inputs_embeds"][0]
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_arguments_replay_to_the_models_own_logits(demo: VLM, samples: tuple[CalibrationSample, ...]) -> None:
    model: Any = load_vlm("demo").model.float()
    batch = alone(demo, samples[:1])[0]
    with torch.no_grad():
        hidden = model.get_decoder()(**batch.kwargs).last_hidden_state
        found = model.get_output_embeddings()(hidden)[0]
    processor = demo.processor()
    text = processor.tokenizer.decode(batch.input_ids[0])
    assert text.startswith("<|im_start|>User:<fake_token_around_image>")
    answer = processor.tokenizer.decode(batch.input_ids[0][batch.answer[0]])
    assert answer == samples[0].messages[-1].text + "<end_of_utterance>"
    # The model was trained on prompts of exactly this form: it predicts the answer it is shown.
    places = batch.answer[0].nonzero()[:, 0]
    assert torch.equal(found[places - 1].argmax(-1), batch.input_ids[0][places])


def test_images_and_shares(demo: VLM, samples: tuple[CalibrationSample, ...]) -> None:
    batches = list(capture_batches(demo, samples, RECIPE))
    shares = token_shares(batches)
    assert shares.tokens == sum(int(b.valid.sum()) for b in batches)
    assert 0.3 < shares.image < 0.5
    assert shares.to_dict()["text_share"] == pytest.approx(1 - shares.image)
    text_only = list(capture_batches(demo, samples, Recipe("test", text_only=True, batch_size=4)))
    assert token_shares(text_only).image_tokens == 0
    assert token_shares(text_only).tokens < shares.tokens


@pytest.mark.parametrize("fixture", ["tiny_idefics3", "tiny_llava"])
def test_other_families_and_two_images(fixture: str, request: pytest.FixtureRequest) -> None:
    vlm = load_vlm(str(request.getfixturevalue(fixture)))
    colours = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    asked = (Turn("user", "what is this?"), Turn("assistant", "a red square."))
    mixed = [
        CalibrationSample((colours[0],), asked, "one"),
        CalibrationSample(tuple(colours), asked, "two"),
        CalibrationSample((), asked, "none"),
    ]
    batches = list(capture_batches(vlm, mixed, RECIPE))
    assert [b.valid.shape[0] for b in batches] == [2, 1]
    ones, twos = batches[0].image.sum(1).tolist()
    assert twos == 2 * ones > 0
    assert batches[1].image.sum() == 0
    assert batches[0].answer.any(1).all()


def test_a_model_without_a_chat_template(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm(str(tiny_llava))
    processor = vlm.processor()
    processor.chat_template = None
    monkeypatch.setattr(VLM, "processor", lambda self: processor)
    asked = (Turn("user", "what is this?"), Turn("assistant", "a red square."))
    sample = CalibrationSample((Image.new("RGB", (32, 32), "red"),), asked, "one")
    batch = alone(vlm, [sample])[0]
    assert batch.image.any()
    assert processor.tokenizer.decode(batch.input_ids[0][batch.answer[0]]) == "a red square."


def test_long_conversations_lose_their_last_turns(demo: VLM) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c " * 200), Turn("assistant", "d"))
    sample = CalibrationSample((Image.new("RGB", (64, 64), "red"),), turns, "long one")
    hopeless = CalibrationSample(sample.images, turns[2:], "hopeless one")
    notes: list[str] = []
    batches = list(capture_batches(demo, [sample, hopeless], Recipe("test", max_tokens=100), notes))
    assert [b.input_ids.shape[0] for b in batches] == [1]
    assert batches[0].input_ids.shape[1] < 100
    assert notes[0] == "1 samples lost their last turns to fit in 100 tokens"
    assert "1 samples were left out: longer than 100 tokens: hopeless one" in notes[1]


def test_a_processor_that_cannot_pad_gets_single_samples(
    demo: VLM, samples: tuple[CalibrationSample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = demo.processor()

    class NoPadding:
        chat_template, tokenizer, image_processor = real.chat_template, real.tokenizer, real.image_processor
        apply_chat_template = staticmethod(real.apply_chat_template)

        def __call__(self, **values: Any) -> Any:
            if "padding" in values:
                raise ValueError("cannot pad")
            return real(**values)

    monkeypatch.setattr(VLM, "processor", lambda self: NoPadding())
    notes: list[str] = []
    batches = list(capture_batches(demo, samples, RECIPE, notes))
    assert len(batches) == len(samples)
    assert notes == ["the processor cannot pad, so samples ran one at a time: cannot pad"]


def test_nothing_to_calibrate_on_is_refused(demo: VLM, samples: tuple[CalibrationSample, ...]) -> None:
    with pytest.raises(BadInputError, match="none of 6 samples has a token"):
        list(capture_batches(demo, samples, Recipe("test", max_tokens=3)))


def test_a_sample_that_the_processor_refuses_is_named(demo: VLM) -> None:
    image = Image.new("RGB", (64, 64), "red")
    sample = CalibrationSample((image,), (Turn("user", "<image> <image>"),), "odd one")
    with pytest.raises(BadInputError, match="odd one: Idefics3Processor cannot make inputs"):
        alone(demo, [sample])
