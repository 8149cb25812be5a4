"""Questions from a file: read strictly, sampled evenly, scored by exact match."""

import json

import pytest
from PIL import Image

from vlmexport.errors import BadInputError
from vlmexport.verify.questions import Question, is_correct, load_questions, sample


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


def written(folder, *lines):
    file = folder / "samples.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_a_question_with_one_answer(folder):
    (found,) = load_questions(written(folder, {"image": "a.png", "question": "What?", "answers": "a dot"}, ""))
    assert found == Question((folder / "a.png",), "What?", ("a dot",))


def test_several_images_answers_and_a_task(folder):
    line = {"image": ["a.png", "a.png"], "question": "What?", "answers": ["x", "y"], "task": "ocr"}
    (found,) = load_questions(written(folder, line))
    assert (len(found.images), found.answers, found.task) == (2, ("x", "y"), "ocr")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ({"image": "b.png", "question": "?", "answers": ["x"]}, "no such image"),
        ({"image": "a.png", "answers": ["x"]}, "question must be a text"),
        ({"image": "a.png", "question": "?", "answers": []}, "question must be a text"),
        ({"image": "a.png", "question": "?", "answers": 3}, "answers must be a text"),
        ({"image": 3, "question": "?", "answers": ["x"]}, "image must be a text"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    good = {"image": "a.png", "question": "?", "answers": ["x"]}
    with pytest.raises(BadInputError, match=message) as caught:
        load_questions(written(folder, good, line))
    assert "samples.jsonl:2" in str(caught.value)


def test_no_file_and_no_questions(folder):
    with pytest.raises(BadInputError, match="no such samples file"):
        load_questions(folder / "none.jsonl")
    with pytest.raises(BadInputError, match="holds no questions"):
        load_questions(written(folder, ""))


def test_the_sample_has_equally_many_of_every_task():
    questions = [Question((), str(i), ("x",), task) for task in "abc" for i in range(40)]
    chosen = sample(questions, 30)
    assert [sum(q.task == t for q in chosen) for t in "abc"] == [10, 10, 10]
    assert [q.text for q in chosen[:3]] == ["0", "4", "8"]
    assert sample(questions, 30) == chosen
    assert sample(questions[:2], 30) == questions[:2]
    assert sample([]) == []


def test_scoring_forgives_case_space_and_a_final_period_only():
    assert is_correct(" Red  circle. ", ["red circle"])
    assert is_correct("7", ["8", "7"])
    assert not is_correct("red circles", ["red circle"])
    assert not is_correct("", ["red"])
