"""Take this machine's paths out of what is shown to others."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# An absolute path of two or more levels inside a text, not the path of an address (https://host/a/b).
_INSIDE = re.compile(r"""(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s'"`,;:()\[\]/\\]+[/\\])+([^\s'"`,;:()\[\]/\\]+)""")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


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
    if "\n" not in text and (text.startswith(("/", "~/", "./", "../", "\\")) or text == ".." or _DRIVE.match(text)):
        windows = bool(_DRIVE.match(text)) or text.startswith("\\")
        name = (PureWindowsPath(text) if windows else PurePosixPath(text)).name
        if name and " /" not in text:
            return name
    return _INSIDE.sub(r"\1", text)
