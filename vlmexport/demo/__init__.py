"""The bundled model and its frozen questions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlmexport.errors import BadInputError

MODEL_SHA256: Final = "7b5089d72e351768e5d5f7179e68b31d1856db437d5e10348b09cb0c898c07ab"

_HERE: Final = Path(__file__).parent
# One of each kind, the ones that `vlmexport demo` asks.
_TOUR_TASKS: Final = ("describe", "word", "bars")


@dataclass(frozen=True)
class FrozenQuestion:
    """A held-out question: the picture's file, what is asked and every answer that counts as right."""

    image: Path
    task: str
    question: str
    answers: tuple[str, ...]


def model_dir() -> Path:
    """Return the folder of the bundled model (config, weights, tokenizer, processor)."""
    return _HERE / "model"


def questions_file() -> Path:
    """Return the JSON Lines file of held-out questions; its image paths are relative to its folder."""
    return _HERE / "questions" / "questions.jsonl"


def frozen_questions() -> list[FrozenQuestion]:
    """Return all held-out questions in file order."""
    folder = questions_file().parent
    lines = [json.loads(line) for line in questions_file().read_text(encoding="utf-8").splitlines()]
    return [
        FrozenQuestion(folder / line["image"], line["task"], line["question"], tuple(line["answers"])) for line in lines
    ]


def demo_questions() -> list[FrozenQuestion]:
    """Return the three questions that the demo asks."""
    found = frozen_questions()
    return [next(question for question in found if question.task == task) for task in _TOUR_TASKS]


def check_model() -> None:
    """Check the weights against their pin.

    Raises:
        BadInputError: the file is not the one that was shipped.
    """
    file = model_dir() / "model.safetensors"
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != MODEL_SHA256:
        raise BadInputError(f"{file} has sha256 {found}, but the bundled model has {MODEL_SHA256}")
