"""Measure a checkpoint on the frozen questions: greedy `generate` per task, and what plain rounding costs.

`python -m tools.train_fixture.evaluate MODEL` prints the tables of the model card.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from tools.train_fixture.design import PHASES
from tools.train_fixture.rows import IGNORED, Batch, RowMaker
from tools.train_fixture.train import answer_logits
from vlmexport.calibrate.synthetic import Question
from vlmexport.demo import FrozenQuestion, frozen_questions
from vlmexport.demo.variants import make_outlier_variant

MAX_NEW_TOKENS = 64
Score = dict[str, tuple[int, int]]
Item = TypeVar("Item")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return the model in eval mode and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def generated(model: PreTrainedModel, processor: ProcessorMixin, questions: list[FrozenQuestion]) -> list[str]:
    """Return the greedy answers; only prompts of equal length share a batch, so nothing is padded."""
    prompts = [_inputs(processor, question) for question in questions]
    by_length: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, inputs in enumerate(prompts):
        by_length[(inputs["input_ids"].shape[1], inputs["pixel_values"].shape[1])].append(index)
    answers = [""] * len(questions)
    for members in by_length.values():
        for chunk in _chunks(members, 32):
            batch = {key: torch.cat([prompts[i][key] for i in chunk]) for key in prompts[chunk[0]]}
            ids = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            new = ids[:, batch["input_ids"].shape[1] :]
            for index, text in zip(chunk, processor.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[index] = text.strip()
    return answers


def _inputs(processor: ProcessorMixin, question: FrozenQuestion) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(question.image) as image:
        return dict(processor(text=prompt, images=[image.convert("RGB")], return_tensors="pt"))


def score(questions: list[FrozenQuestion], answers: list[str]) -> Score:
    """Return (right, asked) per task."""
    found: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        found[question.task].append(answer in question.answers)
    return {task: (sum(hits), len(hits)) for task, hits in found.items()}


@dataclass(frozen=True)
class Forced:
    """Teacher-forced results: log probabilities [N, vocabulary] at answer tokens and which answers are all right."""

    logprobs: torch.Tensor
    right: list[bool]

    def accuracy(self) -> float:
        """Percent of answers whose every token, the end included, is the most likely one."""
        return 100 * sum(self.right) / len(self.right)

    def kl_from(self, reference: Forced) -> float:
        """Mean Kullback-Leibler divergence of the reference's distribution from this one's, in nats."""
        given = reference.logprobs
        return float((given.exp() * (given - self.logprobs)).sum(-1).mean())

    def top1_with(self, reference: Forced) -> float:
        """Percent of answer tokens at which both prefer the same token."""
        return float((self.logprobs.argmax(-1) == reference.logprobs.argmax(-1)).float().mean() * 100)


def question_batches(processor: ProcessorMixin, questions: list[FrozenQuestion]) -> list[Batch]:
    """Return the questions as packed rows; questions that share a picture share its prefix."""
    maker = RowMaker(processor, PHASES[-1])
    rows = []
    for file, group in groupby(questions, key=lambda question: question.image):
        with Image.open(file) as image:
            asked = [Question(q.task, q.question, q.answers[0]) for q in group]
            rows.append(maker.row([image.convert("RGB")], asked))
    return [maker.collate(chunk) for chunk in _chunks(rows, 32)]


@torch.no_grad()
def forced(model: PreTrainedModel, batches: list[Batch]) -> Forced:
    """Run the batches and judge every answer."""
    logprobs, right = [], []
    for batch in batches:
        logits, labels = answer_logits(model, batch)
        hit = torch.zeros_like(batch.labels, dtype=torch.bool)
        hit[batch.labels != IGNORED] = logits.argmax(-1) == labels
        logprobs.append(logits.log_softmax(-1))
        right.extend(bool(hit[line, start:stop].all()) for line, start, stop, _ in batch.answers)
    return Forced(torch.cat(logprobs), right)


@torch.no_grad()
def round_text_linears(model: PreTrainedModel, bits: int, group: int) -> None:
    """Replace the decoder layers' weights by their symmetric round-to-nearest values."""
    top = 2 ** (bits - 1) - 1
    for module in model.model.text_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.view(-1, group)
            scale = (groups.abs().amax(1, keepdim=True) / top).clamp_min(1e-30)
            module.weight.copy_(((groups / scale).round().clamp(-top - 1, top) * scale).view_as(module.weight))


def sensitivity(folder: Path, batches: list[Batch]) -> Iterator[str]:
    """Yield one Markdown table row per rounding of the plain model and of the outlier variant."""
    reference = forced(load(folder)[0], batches)
    with tempfile.TemporaryDirectory() as work:
        outliers = make_outlier_variant(folder, Path(work) / "outliers")
        for name, source in (("plain", folder), ("outlier", outliers)):
            same = forced(load(source)[0], batches)
            yield _table_row(f"{name} FP32", same, reference)
            for bits, group in ((8, 128), (4, 128), (4, 32)):
                model, _ = load(source)
                round_text_linears(model, bits, group)
                yield _table_row(f"{name} INT{bits} g{group} RTN", forced(model, batches), reference)


def _table_row(name: str, found: Forced, reference: Forced) -> str:
    kl = found.kl_from(reference)
    return f"| {name} | {found.accuracy():.2f} | {kl:.5f} | {found.top1_with(reference):.2f} |"


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


def main() -> None:
    """Print accuracy per task by greedy generation from the BF16 file in FP32, then the sensitivity table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    questions = frozen_questions()
    model, processor = load(folder)
    result = score(questions, generated(model, processor, questions))
    for task, (right, asked) in sorted(result.items()):
        print(f"| {task} | {right}/{asked} | {100 * right / asked:.1f} |", flush=True)
    total = (sum(right for right, _ in result.values()), sum(asked for _, asked in result.values()))
    print(f"| all | {total[0]}/{total[1]} | {100 * total[0] / total[1]:.2f} |", flush=True)
    for row in sensitivity(folder, question_batches(processor, questions)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
