"""Take this machine's paths out of what is shown to others."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_NAME = r"""[^\s'"`,;:()\[\]/\\]+"""
# Absolute paths of two or more levels inside a text; not the path of an address (https://host/a/b), no TeX.
_INSIDE = (
    re.compile(rf"(?<![\w.:/\\])~?/(?:{_NAME}/)+({_NAME})"),
    re.compile(rf"(?<!\w)(?:[A-Za-z]:[/\\]|\\\\)(?:{_NAME}[/\\])*({_NAME})"),
)
_WINDOWS = re.compile(r"[A-Za-z]:[/\\]|\\\\")


def without_local_paths(data: Any) -> Any:
    """`data` (of JSON) with each path of this machine as its last name alone, in values, keys and inside sentences.

    A whole string counts as one when it is absolute, or begins with ``~``, ``./`` or ``..``.
    """
    if isinstance(data, dict):
        return {without_local_paths(key): without_local_paths(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_local_paths(value) for value in data]
    return _without(data) if isinstance(data, str) else data


def _without(text: str) -> str:
    windows = _WINDOWS.match(text) is not None
    if "\n" not in text and " /" not in text and (windows or text == ".." or text.startswith(("/", "~/", "./", "../"))):
        name = (PureWindowsPath(text) if windows else PurePosixPath(text)).name
        if name:
            return name
    for inside in _INSIDE:
        text = inside.sub(r"\1", text)
    return text
