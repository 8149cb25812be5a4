"""Calibration samples from every kind of source, and refusals that name the file and line."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmexport.calibrate.conversation import Turn, read_turns
from vlmexport.calibrate.dataset import draw_samples, load_samples
from vlmexport.calibrate.recipe import Recipe
from vlmexport.calibrate.synthetic import CALIBRATION_SEEDS
from vlmexport.errors import BadInputError


def picture(path: Path, colour: str = "red") -> Path:
    Image.new("RGB", (20, 10), colour).save(path)
    return path


def json_lines(folder: Path, *lines: dict[str, Any] | str) -> Recipe:
    file = folder / "talk.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return Recipe("talk", kind="jsonl", source=str(file))


def test_drawn_samples_hold_question_and_answer_and_balance_the_tasks() -> None:
    found = load_samples(Recipe("synthetic", samples=40)).samples
    assert len(found) == 40
    assert all([turn.role for turn in sample.messages] == ["user", "assistant"] for sample in found)
    seeds = [int(sample.source.removeprefix("synthetic[").removesuffix("]")) for sample in found]
    assert all(seed in CALIBRATION_SEEDS for seed in seeds)
    assert len(set(seeds)) == 40
    few = load_samples(Recipe("synthetic", samples=20, tasks=("count", "bars"))).samples
    counted = sum(sample.messages[0].text.startswith("How many") for sample in few)
    assert 6 <= counted <= 14


def test_the_seed_decides_and_more_samples_go_on() -> None:
    first = [s.source for s in islice(draw_samples(Recipe("a", seed=1)), 5)]
    assert first == [s.source for s in load_samples(Recipe("a", seed=1, samples=9)).samples[:5]]
    assert first != [s.source for s in islice(draw_samples(Recipe("a", seed=2)), 5)]


def test_json_lines_of_all_shapes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    talk = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A wall."}]
    llava = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A wall."}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, talk[1]]
    recipe = json_lines(
        tmp_path,
        {"image": "a.png", "messages": talk},
        {"image": ["a.png"], "conversations": llava},
        "",
        {"image": "a.png", "conversation": parts},
        {"image": "a.png", "question": "What?", "answer": "A wall."},
        {"image": "a.png", "question": "What?", "answers": ["A wall.", "Bricks."]},
    )
    found = load_samples(recipe)
    assert {sample.messages for sample in found.samples} == {(Turn("user", "What?"), Turn("assistant", "A wall."))}
    assert all(sample.images == (tmp_path / "a.png",) for sample in found.samples)
    assert found.samples[0].pictures()[0].size == (20, 10)
    assert found.notes == ("128 calibration samples were asked for; there are 5, and all are used",)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", r"talk\.jsonl:2: not valid JSON"),
        ("[1]", r"talk\.jsonl:2: expected an object"),
        ({"image": 3, "question": "q"}, r"talk\.jsonl:2: `image` must be a path"),
        ({"image": "a.png", "text": "q"}, r"talk\.jsonl:2: expected `messages`.*found keys \['image', 'text'\]"),
        ({"messages": []}, r"talk\.jsonl:2: messages must be a list"),
        ({"messages": ["hi"]}, r"talk\.jsonl:2: messages\[0\] must be an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"talk\.jsonl:2: messages\[0\] has role 'bot'; choose"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]: the content must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither an image nor a text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no turn of the user"),
    ],
)
def test_a_line_of_unknown_shape_is_refused_with_its_number(tmp_path: Path, line: Any, fault: str) -> None:
    with pytest.raises(BadInputError, match=fault):
        load_samples(json_lines(tmp_path, {"question": "fine"}, line))


def test_a_folder_of_images_gets_the_neutral_prompt(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        picture(tmp_path / name) if name != "notes.txt" else (tmp_path / name).write_text("x")
    found = load_samples(Recipe("pics", kind="folder", source=str(tmp_path), samples=2))
    assert {sample.source for sample in found.samples} == {str(tmp_path / "b.PNG"), str(tmp_path / "a.jpg")}
    assert {sample.messages for sample in found.samples} == {(Turn("user", Recipe("x").prompt),)}


@pytest.mark.parametrize("damage", [b"", b"not a picture", None])
def test_an_unreadable_image_is_named_and_skipped_only_when_asked(tmp_path: Path, damage: bytes | None) -> None:
    picture(tmp_path / "a.png")
    if damage is not None:
        (tmp_path / "b.png").write_bytes(damage)
    recipe = json_lines(tmp_path, {"image": "a.png", "question": "q"}, {"image": "b.png", "question": "q"})
    with pytest.raises(BadInputError, match=r"talk\.jsonl:2: .*b\.png.*--skip-unreadable"):
        load_samples(recipe)
    lenient = Recipe("talk", kind="jsonl", source=recipe.source, samples=2, skip_unreadable=True)
    found = load_samples(lenient)
    assert len(found.samples) == 1
    assert len(found.skipped) == 1
    assert "b.png" in found.skipped[0]
    assert any("1 calibration samples were left out" in note for note in found.notes)
    assert found.to_dict()["skipped"] == list(found.skipped)


def test_text_only_reads_no_image(tmp_path: Path) -> None:
    recipe = Recipe("talk", kind="jsonl", source=json_lines(tmp_path, {"image": "gone.png", "question": "q"}).source)
    with pytest.raises(BadInputError, match="no such image"):
        load_samples(recipe)
    text_only = Recipe("talk", kind="jsonl", source=recipe.source, text_only=True)
    assert any("text only" in note for note in load_samples(text_only).notes)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="holds no calibration samples"):
        load_samples(json_lines(tmp_path, ""))
    with pytest.raises(BadInputError, match="holds no images"):
        load_samples(Recipe("pics", kind="folder", source=str(tmp_path)))
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(BadInputError, match="gives no samples: all 1 have unreadable images"):
        load_samples(Recipe("pics", kind="folder", source=str(tmp_path), skip_unreadable=True))
    with pytest.raises(BadInputError, match="no such folder"):
        load_samples(Recipe("pics", kind="folder", source=str(tmp_path / "gone")))
    with pytest.raises(BadInputError, match="no such calibration file"):
        load_samples(Recipe("talk", kind="jsonl", source=str(tmp_path / "gone.jsonl")))


def test_a_system_turn_is_kept() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    assert read_turns({"messages": turns}, "here") == (Turn("system", "Be brief."), Turn("user", "q"))
