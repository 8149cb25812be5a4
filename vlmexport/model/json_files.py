"""The JSON files beside a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmexport.errors import BadInputError


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file `path`; raises `BadInputError` when it holds no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise BadInputError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(data, dict):
        raise BadInputError(f"{path} is not a JSON object but a {type(data).__name__}; restore the file")
    return data


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; empty when there is no such file."""
    return read_json(path) if path.is_file() else {}
