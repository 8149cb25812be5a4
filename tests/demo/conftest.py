"""The bundled model and a spread of its frozen questions, loaded once."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, ProcessorMixin

from tools.train_fixture.evaluate import load
from vlmexport.demo import FrozenQuestion, frozen_questions, model_dir


@pytest.fixture(scope="session")
def bundled() -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model in FP32 and its processor."""
    return load(model_dir())


def some_questions(per_task: int) -> list[FrozenQuestion]:
    """Return the first `per_task` questions of every task, in file order."""
    taken: dict[str, int] = {}
    chosen = []
    for question in frozen_questions():
        taken[question.task] = taken.get(question.task, 0) + 1
        if taken[question.task] <= per_task:
            chosen.append(question)
    return chosen
