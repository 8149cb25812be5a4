"""Rounds of a ``gguf`` export: the question as files, and one answer of llama.cpp as a `Round`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


def save_question(artifact: Path, prompt: str, pictures: Sequence[Image], folder: Path) -> None:
    """Write the rendered prompt and its pictures into `folder`: llama.cpp prepares the pixels itself."""
    from vlmexport.runtime.llamacpp.bindings import MARKER
    from vlmexport.runtime.llamacpp.prompt import marked_prompt, prompt_builder

    folder.mkdir()
    names = [f"{index}.png" for index in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / name)
    text = marked_prompt(prompt_builder(artifact), prompt, len(pictures), MARKER)
    (folder / _QUESTION).write_text(json.dumps({"text": text, "images": names}), encoding="utf-8")


def load_rounds(export: Path, question: Path, tokens: int, threads: int) -> Callable[[], Round]:
    """Load the export with a context that just holds the question and its answer; each call measures one answer."""
    from vlmexport.runtime.llamacpp.export import open_runner
    from vlmexport.runtime.prompt import load_image

    asked = json.loads((question / _QUESTION).read_text(encoding="utf-8"))
    pictures = [load_image(question / name) for name in asked["images"]]
    runner = open_runner(open_artifact(export, check_hashes=False), threads=threads)
    runner.reserve(len(runner.prompt(asked["text"], pictures).ids) + tokens + 1)
    runner.prepare()
    return lambda: measure_answer(runner, asked["text"], pictures, tokens)


def measure_answer(runner: LlamaCppRunner, text: str, pictures: Sequence[Image], tokens: int) -> Round:
    """Answer greedily with exactly `tokens` decode steps, whatever the model says; pictures are encoded anew.

    As for the other runners, preparing the pixels is not counted.
    """
    prompt = runner.prompt(text, pictures)
    timings = Timings()
    for _ in runner.generate(prompt, Sampling(max_new_tokens=tokens + 1), timings, end_tokens=()):
        pass
    return Round(len(prompt.ids), timings.image_ms, timings.prefill_ms, tuple(timings.decode_ms))
