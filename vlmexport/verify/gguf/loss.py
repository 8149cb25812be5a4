"""The quantization loss: llama.cpp as its users run it, from pixels to answer, against the original model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmexport.calibrate.synthetic import TEST_SEEDS, samples
from vlmexport.errors import BadInputError
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.prompt import load_image
from vlmexport.runtime.protocol import PartOutputError
from vlmexport.target import GgufLimits
from vlmexport.verify.gates import Gate, NotRunError
from vlmexport.verify.gguf.chat import words
from vlmexport.verify.gguf.prompts import ids_fault, prompt_ids
from vlmexport.verify.gguf.reference import FullReference
from vlmexport.verify.quantization import Answers, judge_quantization
from vlmexport.verify.questions import SCORED_TOKENS, UNSCORED_TOKENS, Question, is_correct
from vlmexport.verify.result import QuantizationSummary

if TYPE_CHECKING:
    from PIL.Image import Image


def check_loss(
    gate: Gate,
    reference: FullReference,
    runner: LlamaCppRunner,
    asked: Sequence[Question],
    drawn: int,
    limits: GgufLimits,
) -> tuple[Answers, QuantizationSummary]:
    """``quantization/kl``, ``/top1``, ``/perplexity_ratio`` and, for scored questions, ``/accuracy``.

    Both sides are judged on the original's greedy answers, to the questions or else to `drawn` pictures. A prompt that
    llama.cpp makes other tokens of fails ``quantization/answers``.
    """
    found, summary = Answers(), QuantizationSummary()
    with gate.guard("quantization/answers", "model", "quantization"):
        for pictures, question in _items(asked, drawn):
            _answer(found, reference, runner, pictures, question)
        summary = judge_quantization(gate, found, limits)
    return found, summary


def _items(asked: Sequence[Question], drawn: int) -> Iterator[tuple[list[Image], Question]]:
    for question in asked:
        yield [load_image(path) for path in question.images], question
    if not asked:
        for index in range(drawn):
            sample = next(samples(TEST_SEEDS[-1 - index], 1))
            yield [sample.image], Question((), sample.question, ())


def _answer(
    found: Answers, reference: FullReference, runner: LlamaCppRunner, pictures: list[Image], question: Question
) -> None:
    made = words(reference, question.text, len(pictures), runner.marker)
    try:
        own = reference.encode(made.rendered, pictures)
    except (BadInputError, ValueError, TypeError) as error:
        raise NotRunError(
            f"the model's own processor refuses a prompt: {' '.join(str(error).split())[:200]}"
        ) from error
    cut = runner.prompt(made.marked, pictures)
    if fault := ids_fault(prompt_ids(cut), own.ids, reference.image_token_id):
        raise PartOutputError("processor", f"{question.text[:40]!r}: {fault}")
    runner.reserve(len(cut.ids) + SCORED_TOKENS)
    tokens = reference.answer(own, SCORED_TOKENS if question.answers else UNSCORED_TOKENS)
    wanted = reference.logits(own, tokens[:-1], len(tokens))
    logits = runner.forced(cut, tokens)
    found.add(wanted, logits, np.array(tokens, np.int64))
    if question.answers:
        # Where every forced token is also the likeliest, the greedy answer is this one.
        same = logits.argmax(-1).tolist() == tokens
        given = tokens if same else runner.greedy(cut, SCORED_TOKENS)
        right = [is_correct(reference.decode(answer), question.answers) for answer in (tokens, given)]
        found.hits.append((question.task, right[0], right[1]))
