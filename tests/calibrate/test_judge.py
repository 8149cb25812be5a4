"""The judge: exact zero, agreement with a whole forward, prefix reuse, and its confidence limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlmexport.calibrate.conversation import Turn
from vlmexport.calibrate.dataset import CalibrationSample
from vlmexport.calibrate.judge import Judge, _summary, exchanged
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.sensitivity import decoder_part, held_out_batches
from vlmexport.errors import BadInputError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.split.capture import split_model

O_PROJ = "model.text_model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def demo() -> VLM:
    return load_vlm("demo")


@pytest.fixture(scope="module")
def judge(demo: VLM) -> Iterator[Judge]:
    batches, _ = held_out_batches(demo, CalibrationOptions(), 0, 12)
    found = Judge(demo.model, decoder_part(split_model(demo)), batches)
    with found.ready():
        yield found


def test_the_same_weights_have_no_divergence(judge: Judge) -> None:
    found = judge.divergence({})
    assert (found.kl, found.upper, found.samples) == (0.0, 0.0, 12)
    same = judge.model.get_parameter(O_PROJ).clone()
    assert judge.divergence({O_PROJ: same}).kl == 0.0


def test_divergence_is_the_whole_models_over_text(demo: VLM, judge: Judge) -> None:
    model: Any = judge.model
    changed = model.get_parameter(O_PROJ) * 1.5
    total, answers, tokens, answered = 0.0, 0.0, 0, 0
    for batch in judge.batches:
        plain = model.get_output_embeddings()(model.get_decoder()(**batch.kwargs).last_hidden_state)
        with exchanged(model, {O_PROJ: changed}):
            other = model.get_output_embeddings()(model.get_decoder()(**batch.kwargs).last_hidden_state)
        p, q = (x.double().log_softmax(-1) for x in (plain, other))
        kl = (p.exp() * (p - q)).sum(-1)[:, :-1]
        text = (batch.valid & ~batch.image)[:, 1:]
        total += float(kl[text].sum())
        tokens += int(text.sum())
        answers += float(kl[batch.answer[:, 1:]].sum())
        answered += int(batch.answer[:, 1:].sum())
    found = judge.divergence({O_PROJ: changed})
    assert found.tokens == tokens
    assert found.kl > 1e-4
    assert found.kl == pytest.approx(total / tokens, rel=1e-3)
    assert found.answer_kl == pytest.approx(answers / answered, rel=1e-2)


def test_running_from_a_layer_on_gives_the_same(judge: Judge) -> None:
    changed = {O_PROJ: judge.model.get_parameter(O_PROJ) * 1.5}
    hidden = judge.advance(0, judge.inputs())
    assert judge.divergence(changed, 1, hidden) == judge.divergence(changed)


def test_afterwards_the_model_is_as_it_was(demo: VLM) -> None:
    before = {name: (id(p), p.dtype) for name, p in demo.model.named_parameters()}
    batches, _ = held_out_batches(demo, CalibrationOptions(), 0, 2)
    fresh = load_vlm("demo")
    judge = Judge(fresh.model, decoder_part(split_model(fresh)), batches)
    identities = {name: id(p) for name, p in fresh.model.named_parameters()}
    with judge.ready(), exchanged(fresh.model, {O_PROJ: torch.zeros(256, 256)}):
        assert not fresh.model.get_parameter(O_PROJ).any()
    assert {name: id(p) for name, p in fresh.model.named_parameters()} == identities
    assert before == {name: (id(p), p.dtype) for name, p in demo.model.named_parameters()}


def test_a_tied_head_changes_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.tiny import make_tiny

    vlm = load_vlm(str(make_tiny("idefics3", tmp_path_factory.mktemp("tied") / "m", tied=True)))
    table = vlm.model.get_input_embeddings().weight
    with exchanged(vlm.model, {"lm_head.weight": torch.zeros_like(table)}):
        assert vlm.model.get_input_embeddings().weight is table
        assert not vlm.model.get_output_embeddings().weight.any()
    assert vlm.model.get_output_embeddings().weight is table


def test_the_upper_limit_covers_the_spread_between_samples() -> None:
    sums, counts = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64), torch.tensor([2, 2, 0])
    found = _summary(sums, counts, torch.tensor([]))
    assert (found.kl, found.answer_kl, found.samples, found.tokens) == (1.0, 0.0, 2, 4)
    # Two samples of means 0.5 and 1.5: a standard error of 0.5.
    assert found.upper == pytest.approx(1.0 + 1.645 * 0.5)
    even = _summary(torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), 2), torch.tensor([0.5, 1.5]))
    assert (even.upper, even.answer_kl) == (1.0, 1.0)


def test_samples_without_a_text_token_are_refused(demo: VLM, judge: Judge) -> None:
    import dataclasses

    mute = [dataclasses.replace(b, image=torch.ones_like(b.image)) for b in judge.batches]
    with pytest.raises(BadInputError, match="text token to judge by"):
        Judge(judge.model, judge.part, mute)


def test_text_is_judged_and_image_tokens_are_not(demo: VLM) -> None:
    from PIL import Image

    from vlmexport.calibrate.capture import capture_batches
    from vlmexport.calibrate.recipe import Recipe

    sample = CalibrationSample((Image.new("RGB", (64, 64), "red"),), (Turn("user", "Describe the image."),), "one")
    batches = list(capture_batches(demo, [sample], Recipe("x")))
    places = Judge(demo.model, decoder_part(split_model(demo)), batches)._places[0]
    text = batches[0].valid & ~batches[0].image
    assert torch.equal(places[:, :-1], text[:, 1:])
