"""Hub datasets: columns, revision and refusals; the package `datasets` is stood in for, since it is optional."""

from __future__ import annotations

import sys
from io import BytesIO
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from PIL import Image

from vlmexport.calibrate.conversation import Turn
from vlmexport.calibrate.dataset import load_samples
from vlmexport.calibrate.hub import hub_row
from vlmexport.calibrate.recipe import Recipe
from vlmexport.errors import BadInputError, NotPossibleHereError


def png() -> dict[str, Any]:
    buffer = BytesIO()
    Image.new("RGB", (8, 4), "blue").save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


class Stream:
    """As much of an `IterableDataset` as is used; rows come undecoded only after `decode(False)`."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.decoded = rows, True

    def decode(self, enable: bool) -> Stream:
        self.decoded = enable
        return self

    def shuffle(self, seed: int, buffer_size: int) -> list[dict[str, Any]]:
        assert not self.decoded
        return self.rows[seed:] + self.rows[:seed]


def stand_in(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    def load_dataset(name: str, **values: Any) -> Stream:
        asked.update(values, name=name)
        return Stream(rows)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.exceptions = SimpleNamespace(DatasetsError=RuntimeError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision: SimpleNamespace(sha="c0ffee"))
    return asked


def test_rows_are_streamed_at_the_recorded_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": png(), "question": f"q{i}", "answer": "blue"} for i in range(4)]
    asked = stand_in(monkeypatch, rows)
    found = load_samples(Recipe("set", kind="hub", source="me/set", revision="v1", samples=2, seed=1))
    assert found.revision == found.to_dict()["revision"] == "c0ffee"
    assert asked == {"name": "me/set", "split": "train", "revision": "c0ffee", "streaming": True}
    assert [sample.messages[0].text for sample in found.samples] == ["q1", "q2"]
    assert found.samples[0].pictures()[0].size == (8, 4)


def test_captions_answer_the_neutral_prompt() -> None:
    row = hub_row({"image": png(), "caption": ["A blue wall.", "Blue."]}, "here", "Describe.")
    assert row.messages == (Turn("user", "Describe."), Turn("assistant", "A blue wall."))
    two = hub_row({"images": [png(), png()], "question": None, "messages": [{"role": "user", "content": "q"}]}, "x", "")
    assert (len(two.images), two.messages) == (2, (Turn("user", "q"),))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"picture": 1, "text": "x"}, "no column images or image; it has picture, text"),
        ({"image": png(), "label": 3}, "none of the columns messages.* holds a text; it has image, label"),
        ({"image": 3, "text": "x"}, "the image column holds int"),
    ],
)
def test_unknown_columns_are_refused_with_those_there_are(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadInputError, match=fault):
        hub_row(row, "here", "Describe.")


def test_the_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NotPossibleHereError, match=r"pip install 'vlmexport\[datasets\]'"):
        load_samples(Recipe("set", kind="hub", source="me/set"))


def test_an_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [])

    def offline(self: HfApi, name: str, revision: str | None) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", offline)
    with pytest.raises(NotPossibleHereError, match="the hub is out of reach"):
        load_samples(Recipe("set", kind="hub", source="me/set"))
