"""Questions with accepted answers: the bundled model's frozen set or a user's own file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmexport.errors import BadInputError
from vlmexport.verify.threads import SMALL_EXPORT_BYTES

Amount = Literal["sample", "all"]
SAMPLE_SIZE = 100
# Tokens of an answer: of a question with accepted answers, which it must not cut short, and of any other.
SCORED_TOKENS, UNSCORED_TOKENS = 48, 16
_DRAWN_SMALL, _DRAWN = 60, 12


@dataclass(frozen=True)
class Question:
    """One question about pictures: files, text, every accepted answer, and the task it belongs to."""

    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]
    task: str = "all"


def drawn_amount(size: int) -> int:
    """How many questions to draw for an export of `size` bytes whose model has none of its own.

    Enough answer tokens for a share, few enough to wait for.
    """
    return _DRAWN_SMALL if size < SMALL_EXPORT_BYTES else _DRAWN


def load_questions(file: Path) -> list[Question]:
    """Read a JSON Lines file with ``image`` (path or list, relative to the file), ``question`` and ``answers``.

    ``task`` is optional. Raises `BadInputError` naming the line for anything else.
    """
    if not file.is_file():
        raise BadInputError(f"no such samples file: {file}")
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            questions.append(_question(line, file.parent, f"{file}:{number}"))
    if not questions:
        raise BadInputError(f"{file} holds no questions")
    return questions


def bundled_questions(weight_digests: Collection[str], amount: Amount) -> list[Question]:
    """The frozen questions when the bundled model's weights are among `weight_digests` (SHA-256), otherwise none."""
    from vlmexport import demo
    from vlmexport.manifest import file_sha256

    weights = demo.model_dir() / "model.safetensors"
    if not (weights.is_file() and demo.questions_file().is_file()) or file_sha256(weights) not in weight_digests:
        return []
    questions = load_questions(demo.questions_file())
    return questions if amount == "all" else sample(questions)


def sample(questions: Sequence[Question], size: int = SAMPLE_SIZE) -> list[Question]:
    """At most about `size` questions, equally many of every task, spread evenly over each task's order."""
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    each = max(1, size // len(by_task)) if by_task else 0
    chosen = []
    for group in by_task.values():
        count = min(each, len(group))
        chosen += [group[index * len(group) // count] for index in range(count)]
    return chosen


def is_correct(answer: str, accepted: Sequence[str]) -> bool:
    """Exact match after case, surrounding white space and a final period are dropped."""
    return normalise(answer) in {normalise(a) for a in accepted}


def normalise(answer: str) -> str:
    """Lower case, single spaces, no final period."""
    return " ".join(answer.split()).casefold().removesuffix(".").strip()


def _question(line: str, folder: Path, where: str) -> Question:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: expected an object with image, question and answers")
    images = _texts(data.get("image", []), "image", where)
    answers = _texts(data.get("answers"), "answers", where)
    if not isinstance(data.get("question"), str) or not answers:
        raise BadInputError(f"{where}: question must be a text and answers a text or a list of texts")
    files = tuple(folder / image for image in images)
    for file in files:
        if not file.is_file():
            raise BadInputError(f"{where}: no such image: {file}")
    return Question(files, data["question"], answers, str(data.get("task", "all")))


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise BadInputError(f"{where}: {key} must be a text or a list of texts")
    return tuple(texts)
