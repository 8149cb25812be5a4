from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from tools.train_fixture.design import check_seeds
from vlmexport.calibrate.synthetic import CALIBRATION_SEEDS, TASKS, TEST_SEEDS, TRAIN_SEEDS, samples, scene
from vlmexport.demo import demo_questions, frozen_questions, questions_file


def test_enough_questions_per_task() -> None:
    counts = Counter(question.task for question in frozen_questions())
    assert sum(counts.values()) >= 1200
    assert min(counts.values()) >= 100
    assert set(counts) <= set(TASKS)


def test_every_picture_is_there_and_used() -> None:
    used = {question.image for question in frozen_questions()}
    assert used == set((questions_file().parent / "images").iterdir())
    for file in used:
        with Image.open(file) as image:
            assert (image.mode, image.format) == ("RGB", "PNG")


def test_every_question_has_an_answer() -> None:
    for question in frozen_questions():
        assert question.question.strip()
        assert question.answers
        assert all(answer == answer.strip() and answer for answer in question.answers)


def test_the_tour_asks_three_different_tasks() -> None:
    assert len({question.task for question in demo_questions()}) == 3


def test_seed_ranges_are_disjoint() -> None:
    check_seeds()
    assert not set(TEST_SEEDS) & set(CALIBRATION_SEEDS)
    assert TRAIN_SEEDS.stop <= min(TEST_SEEDS.start, CALIBRATION_SEEDS.start)


def test_calibration_pictures_are_not_test_pictures() -> None:
    frozen = set()
    for file in {question.image for question in frozen_questions()}:
        with Image.open(file) as image:
            frozen.add((image.size, image.tobytes()))
    for seed in CALIBRATION_SEEDS[:300]:
        picture = scene(seed).image
        assert (picture.size, picture.tobytes()) not in frozen


def test_samples_are_a_function_of_the_seed() -> None:
    first, again = (list(samples(CALIBRATION_SEEDS.start, 40)) for _ in range(2))
    assert [(s.question, s.answer, s.image.tobytes()) for s in first] == [
        (s.question, s.answer, s.image.tobytes()) for s in again
    ]
    assert len(first) == 40


def test_samples_of_chosen_tasks_only() -> None:
    assert {sample.task for sample in samples(CALIBRATION_SEEDS.start, 30, ("word", "count"))} == {"word", "count"}


@pytest.mark.parametrize("tasks", [(), ("word", "sum")])
def test_unknown_tasks_are_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="choose one or more of shape"):
        next(samples(0, 1, tasks))
