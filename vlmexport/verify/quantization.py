"""The quantization loss: the artifact as shipped, from pixels to answer, against the original model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.runtime.decoder_inputs import DecoderInputs, stacked, token_inputs
from vlmexport.runtime.protocol import Array, ModelInputs, Runner
from vlmexport.target import LossLimits
from vlmexport.verify import metrics
from vlmexport.verify.gates import Gate
from vlmexport.verify.parts import merged_input
from vlmexport.verify.questions import is_correct
from vlmexport.verify.result import AnsweredQuestion, QuantizationSummary, Question, TaskAccuracy

# Runner, prompts and answers to the logits that predict each answer.
Forced: TypeAlias = Callable[[Runner, Sequence[DecoderInputs], Sequence[list[int]]], Iterator[Array]]
_LOGIT_BYTES = 256 << 20
_MAX_BATCH = 16


@dataclass(frozen=True)
class Item:
    """One prompt to answer: made by the export's processor and by the model's own.

    `answers` are the accepted ones; empty for a prompt that is not scored.
    """

    exported: ModelInputs
    reference: ModelInputs
    answers: tuple[str, ...] = ()
    task: str = "all"
    question: str = ""
    images: tuple[Path, ...] = ()


@dataclass
class Answers:
    """What was collected over all items: divergences and likelihoods per answer token, hits per item.

    The answer tokens are the original model's own greedy ones, end token included: both sides are judged on the same.
    """

    kl: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    given: list[AnsweredQuestion] = field(default_factory=list)
    hits: list[tuple[str, bool, bool]] = field(default_factory=list)
    by_step: list[list[float]] = field(default_factory=list)

    def add(self, reference: Array, shipped: Array, tokens: NDArray[np.int64]) -> None:
        """Take in logits ``[tokens, vocab]`` of both sides for one answer."""
        divergences = metrics.kl_per_token(reference, shipped).tolist()
        self.kl += divergences
        self.agreed += (reference.argmax(-1) == shipped.argmax(-1)).tolist()
        self.reference_nll += metrics.token_nll(reference, tokens).tolist()
        self.nll += metrics.token_nll(shipped, tokens).tolist()
        for step, divergence in enumerate(divergences):
            if step == len(self.by_step):
                self.by_step.append([])
            self.by_step[step].append(divergence)

    def ask(self, item: Item, original: str, exported: str) -> None:
        """Take in both texts for one scored item."""
        original_hit, hit = (is_correct(text, item.answers) for text in (original, exported))
        self.hits.append((item.task, original_hit, hit))
        images = tuple(map(str, item.images))
        self.given.append(
            AnsweredQuestion(item.task, item.question, images, item.answers, exported, original, hit, original_hit)
        )

    def summary(self) -> QuantizationSummary:
        """The five numbers; accuracies are None when no item was scored."""
        scored = [(original, exported) for _, original, exported in self.hits]
        return QuantizationSummary(
            kl=float(np.mean(self.kl)),
            top1=float(np.mean(self.agreed)),
            perplexity_ratio=metrics.perplexity_ratio(np.array(self.reference_nll), np.array(self.nll)),
            accuracy=float(np.mean([e for _, e in scored])) if scored else None,
            reference_accuracy=float(np.mean([o for o, _ in scored])) if scored else None,
        )

    def tasks(self) -> tuple[TaskAccuracy, ...]:
        """Accuracy by task, in the order of their first question."""
        names = list(dict.fromkeys(task for task, _, _ in self.hits))
        rows = {n: [(original, exported) for t, original, exported in self.hits if t == n] for n in names}
        return tuple(
            TaskAccuracy(n, len(r), float(np.mean([e for _, e in r])), float(np.mean([o for o, _ in r])))
            for n, r in rows.items()
        )


def answers_in_one_prompt(
    runner: Runner, rows: Sequence[DecoderInputs], answers: Sequence[list[int]]
) -> Iterator[Array]:
    """Logits ``[answer tokens, vocab]`` that predict each answer, teacher-forced in one padded batch."""
    longer = []
    for row, answer in zip(rows, answers, strict=True):
        ids = np.array([answer[:-1]], dtype=np.int64)
        fed = token_inputs(runner, ids) if len(answer) > 1 else row.tokens(0, 0)
        longer.append(row.followed(fed.embeds, fed.extras))
    keep = max(len(answer) for answer in answers)
    if min(row.length for row in longer) < keep:  # a short prompt beside a long answer: one count does not fit all
        for row, answer in zip(longer, answers, strict=True):
            yield row.prefill(runner, keep=len(answer))[0][0]
        return
    inputs, mask = stacked(longer)
    logits, _ = inputs.prefill(runner, mask, keep)
    for index, answer in enumerate(answers):
        yield logits[index, -len(answer) :]


def answers_by_step(runner: Runner, rows: Sequence[DecoderInputs], answers: Sequence[list[int]]) -> Iterator[Array]:
    """The same, but as answers are made: the prompts in one call, every answer token in a decode step of its own.

    For exports whose prompts run other weights than their steps.
    """
    steps = max(len(answer) for answer in answers)
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(runner, mask, reserve=steps)
    kept = [logits[:, -1]]
    for step in range(steps - 1):
        tokens = np.array([[answer[min(step, len(answer) - 1)]] for answer in answers], dtype=np.int64)
        kept.append(token_inputs(runner, tokens).decode(runner, cache)[:, -1])
    for index, answer in enumerate(answers):
        yield np.stack([logits[index] for logits in kept[: len(answer)]])


def collect_answers(
    original: Runner,
    shipped: Runner,
    items: Sequence[Item],
    decode_text: Callable[[list[int]], str],
    max_new_tokens: int,
    vocab_size: int,
    forced: Forced = answers_in_one_prompt,
) -> Answers:
    """Let both sides answer every item greedily, then compare their distributions on the original's answer.

    `decode_text` turns token ids into text without special tokens; `forced` is how `shipped` is fed the answer (by step
    where a prompt has an encoder of its own: no answer stands behind it).
    """
    found, plain = Answers(), answers_in_one_prompt
    if original.merge_spec.decoder_start_token_id is not None:
        plain = forced = answers_by_step
    for batch in _batches(items, max_new_tokens, vocab_size):
        theirs = [merged_input(original, item.reference) for item in batch]
        ours = [merged_input(shipped, item.exported) for item in batch]
        wanted = greedy_answers(original, theirs, max_new_tokens)
        if any(item.answers for item in batch):
            given = greedy_answers(shipped, ours, max_new_tokens)
            for item, right, answer in zip(batch, wanted, given, strict=True):
                if item.answers:
                    found.ask(item, decode_text(right), decode_text(answer))
        reference_logits = plain(original, theirs, wanted)
        for reference, logits, tokens in zip(reference_logits, forced(shipped, ours, wanted), wanted, strict=True):
            found.add(reference, logits, np.array(tokens, dtype=np.int64))
    return found


def judge_quantization(gate: Gate, found: Answers, limits: LossLimits) -> QuantizationSummary:
    """``quantization/kl``, ``/top1``, ``/perplexity_ratio`` and, for scored questions, ``/accuracy``."""
    summary = found.summary()
    question: Question = "quantization"
    part = "model"
    gate.at_most("quantization/kl", part, question, _known(summary.kl), limits.quantization_kl, "nats per token")
    gate.at_least("quantization/top1", part, question, _known(summary.top1), limits.quantization_top1, "share")
    ratio = _known(summary.perplexity_ratio)
    gate.at_most("quantization/perplexity_ratio", part, question, ratio, limits.perplexity_ratio, "ratio")
    if summary.accuracy is not None and summary.reference_accuracy is not None:
        lowest = summary.reference_accuracy - limits.accuracy_drop
        gate.at_least("quantization/accuracy", part, question, summary.accuracy, lowest, "share")
    gate.series["answer_kl"] = tuple(float(np.mean(values)) for values in found.by_step)
    return summary


def greedy_answers(runner: Runner, rows: Sequence[DecoderInputs], max_new_tokens: int) -> list[list[int]]:
    """Greedy token ids of each prompt, the end token included where it came."""
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(runner, mask, reserve=max_new_tokens)
    answers: list[list[int]] = [[] for _ in rows]
    running = np.ones(len(rows), dtype=bool)
    for step in range(max_new_tokens):
        tokens = logits[:, -1].argmax(axis=-1)
        for index in np.nonzero(running)[0]:
            answers[index].append(int(tokens[index]))
        running &= ~np.isin(tokens, runner.eos_token_ids)
        if not running.any() or step + 1 == max_new_tokens:
            break
        logits = token_inputs(runner, tokens[:, None].astype(np.int64)).decode(runner, cache)
    return answers


def _batches(items: Sequence[Item], max_new_tokens: int, vocab_size: int) -> Iterator[list[Item]]:
    """Items of similar length together, in batches whose logits stay small."""
    size = max(1, min(_MAX_BATCH, _LOGIT_BYTES // (4 * vocab_size * max_new_tokens)))
    ordered = sorted(items, key=lambda item: item.exported.input_ids.shape[1])
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _known(value: float | None) -> float:
    return float("nan") if value is None else value
