"""Answers fed token by token give the logits of one long prompt, when both run the same weights."""

import numpy as np
import pytest

from vlmexport.model.load import load_vlm
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.verify.quantization import answers_by_step, answers_in_one_prompt


@pytest.fixture(scope="module")
def runner(tiny_idefics3):
    return TorchRunner(load_vlm(str(tiny_idefics3)))


def test_steps_equal_one_prompt(runner):
    rows = [DecoderInputs(runner.embed(np.arange(5, 5 + length)[None])) for length in (9, 4, 6)]
    answers = [[7, 8, 9], [11], [3, 4, 5, 6, 2]]
    whole = list(answers_in_one_prompt(runner, rows, answers))
    stepped = list(answers_by_step(runner, rows, answers))
    assert [w.shape[0] for w in stepped] == [3, 1, 5]
    for one, other in zip(whole, stepped, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_steps_see_weights_that_only_steps_have(runner):
    """A prompt in one piece cannot: that is why exports with a prompt graph are judged by step."""

    class Split:
        merge_spec = runner.merge_spec
        embed = staticmethod(runner.embed)
        prefill = staticmethod(runner.prefill)

        @staticmethod
        def decode(embeds, cache, keep=1, *, extras=None):
            return runner.decode(embeds, cache, keep, extras=extras) + 1.0 * np.arange(
                runner.model.config.text_config.vocab_size
            )

    rows, answers = [DecoderInputs(runner.embed(np.arange(5, 12)[None]))], [[7, 8, 9]]
    honest = next(answers_in_one_prompt(runner, rows, answers))
    assert np.abs(next(answers_in_one_prompt(Split(), rows, answers)) - honest).max() < 1e-5
    assert np.abs(next(answers_by_step(Split(), rows, answers)) - honest).max() > 1
