"""Rounds of a ``gguf`` export: the question as files, and one answer of llama.cpp as a `Round`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.bench.timing import Round
from vlmexport.manifest import open_artifact
from vlmexport.runtime.generate import Timings
from vlmexport.runtime.sampling import Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmexport.runtime.llamacpp.runner import LlamaCppRunner

_QUESTION = "question.json"


@dataclass(frozen=True)
class Question:
    """A rendered prompt with llama.cpp's markers, and its pictures: llama.cpp prepares the pixels itself."""

    text: str
    pictures: tuple[Image, ...]


def save_question(artifact: Path, prompt: str, pictures: Sequence[Image], folder: Path) -> None:
    """Render `prompt` by the export's chat template and write it with its pictures into `folder`."""
    from vlmexport.runtime.llamacpp.bindings import MARKER
    from vlmexport.runtime.llamacpp.prompt import marked_prompt, prompt_builder

    folder.mkdir()
    names = [f"{index}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / name)
    text = marked_prompt(prompt_builder(artifact), prompt, len(pictures), MARKER)
    (folder / _QUESTION).write_text(json.dumps({"text": text, "images": names}), encoding="utf-8")


def load_question(folder: Path) -> Question:
    """Read what `save_question` wrote."""
    from vlmexport.runtime.prompt import load_image

    data = json.loads((folder / _QUESTION).read_text(encoding="utf-8"))
    return Question(data["text"], tuple(load_image(folder / name) for name in data["images"]))


def load_gguf(export: Path, question: Path, tokens: int, threads: int) -> Callable[[], Callable[[], Round]]:
    """Load the export; the first call settles its threads and gives the function that measures one answer."""
    asked = load_question(question)

    def opened(count: int) -> LlamaCppRunner:
        return open_for(export, asked, tokens, count)

    runner = opened(threads)

    def settled() -> Callable[[], Round]:
        best = settle_threads(runner, opened, asked, threads)
        return lambda: measure_answer(best, asked, tokens)

    return settled


def open_for(export: Path, question: Question, tokens: int, threads: int) -> LlamaCppRunner:
    """llama.cpp with a context that just holds the question and `tokens` answer tokens, ready to decode."""
    from vlmexport.runtime.llamacpp.export import SMALLEST_CONTEXT, open_runner

    artifact = open_artifact(export, check_hashes=False)
    runner = open_runner(artifact, threads=threads, context=SMALLEST_CONTEXT)
    runner.reserve(len(runner.prompt(question.text, question.pictures).ids) + tokens + 1)
    runner.prepare()
    return runner


def settle_threads(
    runner: LlamaCppRunner, opened: Callable[[int], LlamaCppRunner], question: Question, most: int
) -> LlamaCppRunner:
    """The faster of `runner`, which has `most` threads, and one with a single thread, as PyTorch is given too.

    On a busy machine the threads of a small model wait for each other most of the time. One runner is open at a time,
    so that the peak memory is that of one.
    """
    if most == 1:
        return runner
    together = _pace(runner, question)
    runner.close()
    single = opened(1)
    if _pace(single, question) <= together:
        return single
    single.close()
    return opened(most)


def _pace(runner: LlamaCppRunner, question: Question) -> float:
    """Milliseconds of one short answer, after one that warms up."""
    measure_answer(runner, question, 1)
    measured = measure_answer(runner, question, 4)
    return measured.image_ms + measured.prefill_ms + sum(measured.decode_ms)


def measure_answer(runner: LlamaCppRunner, question: Question, tokens: int) -> Round:
    """Answer greedily with exactly `tokens` decode steps, whatever the model says; pictures are encoded anew.

    As for the other runners, preparing the pixels is not counted.
    """
    prompt = runner.prompt(question.text, question.pictures)
    timings = Timings()
    for _ in runner.generate(prompt, Sampling(max_new_tokens=tokens + 1), timings, end_tokens=()):
        pass
    return Round(len(prompt.ids), timings.image_ms, timings.prefill_ms, tuple(timings.decode_ms))
