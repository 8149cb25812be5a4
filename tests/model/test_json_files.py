"""JSON beside the weights: what is broken is refused with the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmexport.errors import BadInputError
from vlmexport.model.json_files import read_json, read_json_if_there


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"own\.json is not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1]", "is not a JSON object but a list"),
    ],
)
def test_what_is_no_object_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_bytes(content)
    for read in (read_json, read_json_if_there):
        with pytest.raises(BadInputError, match=words):
            read(tmp_path / "own.json")


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"a": "ä"}', encoding="utf-8")
    assert read_json(tmp_path / "own.json") == {"a": "ä"}
    assert read_json_if_there(tmp_path / "other.json") == {}
