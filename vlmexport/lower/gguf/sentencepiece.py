"""Slow tokenizers: a checkpoint with a SentencePiece ``tokenizer.model`` and no ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmexport.errors import BadInputError, NotPossibleHereError


def fast_tokenizer_json(folder: Path) -> dict[str, Any]:
    """The ``tokenizer.json`` that transformers makes of the slow tokenizer in `folder`.

    transformers is the judge of what the model was trained with, so its conversion is the reference for ids. Raises
    `BadInputError` without any tokenizer, `NotPossibleHereError` without the packages that read ``tokenizer.model``.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        raise BadInputError(f"{folder}: no tokenizer.json and no tokenizer.model; copy the tokenizer's files there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ImportError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise NotPossibleHereError(
            f"{folder}: transformers cannot read the slow tokenizer here ({first}); "
            "`pip install sentencepiece protobuf`, or save it once with AutoTokenizer(...).save_pretrained"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInputError(f"{folder}: {type(tokenizer).__name__} has no fast form; save one with its tokenizer.json")
    parsed: dict[str, Any] = json.loads(backend.to_str())
    return parsed
