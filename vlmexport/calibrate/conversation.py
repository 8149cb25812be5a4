"""Conversations in the shapes that data sets use, read strictly: one line or row becomes images and turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmexport.errors import BadInputError

# LLaVA's names for the roles beside the usual ones.
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_CONVERSATIONS = ("messages", "conversation", "conversations")
_SHAPES = "`messages` or `conversation` (a list of {role, content}), or `question` and `answer`"
# Marks of a picture's place in data sets; pictures are placed first in the first user turn instead.
_PLACEHOLDERS = ("<image>\n", "\n<image>", "<image>")


@dataclass(frozen=True)
class Turn:
    """One turn of a chat: `role` is ``user``, ``assistant`` or ``system``."""

    role: str
    text: str


@dataclass(frozen=True)
class Row:
    """One line of a file or row of a dataset."""

    images: tuple[Path | bytes, ...]
    messages: tuple[Turn, ...]
    source: str


def read_json_lines(file: Path) -> list[Row]:
    """The lines of a JSON Lines file: ``image`` (a path or a list, relative to the file) and a conversation.

    Raises `BadInputError` with file and line for anything else, and when the file holds no line.
    """
    if not file.is_file():
        raise BadInputError(f"no such calibration file: {file}")
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInputError(f"{file} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_row(line, file.parent, f"{file}:{number}"))
    if not rows:
        raise BadInputError(f"{file} holds no calibration samples")
    return rows


def _row(line: str, folder: Path, where: str) -> Row:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadInputError(f"{where}: expected an object with `image` and {_SHAPES}")
    found = data.get("image", data.get("images", []))
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInputError(f"{where}: `image` must be a path or a list of paths")
    files = tuple(folder / name for name in names)
    return Row(files, read_turns(data, where), where)


def read_turns(data: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    """The conversation of a line or row; `where` names it in errors.

    Takes ``messages``/``conversation``/``conversations`` as a list of ``{role, content}`` (or LLaVA's ``{from,
    value}``; content may be a list of parts, whose texts count), or ``question`` and, where there is one, ``answer``
    (or a list of ``answers``, of which the first is taken).
    Raises `BadInputError` for other shapes and for a conversation without a user's turn.
    """
    key = next((k for k in _CONVERSATIONS if k in data), None)
    if key is not None:
        turns = _turns(data[key], f"{where}: {key}")
    elif isinstance(data.get("question"), str):
        turns = [Turn("user", _clean(data["question"]))]
        answer = _answer(data)
        if answer is not None:
            turns.append(Turn("assistant", _text(answer, f"{where}: answer")))
    else:
        raise BadInputError(f"{where}: expected {_SHAPES}; found keys {sorted(data)}")
    if not any(turn.role == "user" for turn in turns):
        raise BadInputError(f"{where}: the conversation has no turn of the user")
    return tuple(turns)


def _answer(data: Mapping[str, Any]) -> Any:
    """The answer, or the first of ``answers`` (the shape of ``vlmexport verify --samples``)."""
    several = data.get("answers")
    return several[0] if "answer" not in data and isinstance(several, list) and several else data.get("answer")


def _turns(value: Any, where: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise BadInputError(f"{where} must be a list of {{role, content}} that is not empty")
    return [_turn(turn, f"{where}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadInputError(f"{where} must be an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        raise BadInputError(f"{where} has role {role!r}; choose one of {', '.join(_ROLES)}")
    return Turn(_ROLES[role], _text(content, where))


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _clean(content)
    if not isinstance(content, list):
        raise BadInputError(f"{where}: the content must be a text or a list of parts")
    parts = [part if isinstance(part, str) else _part_text(part, where) for part in content]
    return _clean("\n".join(part for part in parts if part))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return ""
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise BadInputError(f"{where}: a part of the content is neither an image nor a text")
    return text


def _clean(text: str) -> str:
    for mark in _PLACEHOLDERS:
        text = text.replace(mark, "")
    return text.strip()
