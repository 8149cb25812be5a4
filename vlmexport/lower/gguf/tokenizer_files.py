"""The files of a checkpoint that say how text becomes token ids, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlmexport.errors import BadInputError
from vlmexport.lower.gguf.sentencepiece import fast_tokenizer_json

Json = Mapping[str, Any]


@dataclass(frozen=True)
class TokenizerFiles:
    """Parsed ``tokenizer.json`` (`tokenizer`), ``tokenizer_config.json`` (`config`), ``special_tokens_map.json``
    (`special`), ``generation_config.json`` (`generation`) and ``config.json`` (`model`); absent files are empty.
    """

    folder: Path
    tokenizer: Json
    config: Json
    special: Json
    generation: Json
    model: Json
    chat_template: str | None

    @cached_property
    def fast(self) -> Tokenizer:
        """The Hugging Face tokenizer itself: the reference for ids."""
        return Tokenizer.from_str(json.dumps(self.tokenizer))

    @cached_property
    def added(self) -> tuple[Json, ...]:
        """The ``added_tokens`` entries in order of their ids."""
        return tuple(sorted(self.tokenizer.get("added_tokens") or (), key=lambda token: int(token["id"])))

    def special_token(self, kind: str) -> str | None:
        """The text of a named token (``bos``, ``eos``, ``pad``...), None where the tokenizer has none."""
        for source in (self.config, self.special):
            entry = source.get(f"{kind}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                return text
        return None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of the checkpoint in `folder`.

    Raises `BadInputError` when there is none or a file is no JSON.
    """
    path = folder / "tokenizer.json"
    tokenizer = _read(path) if path.is_file() else fast_tokenizer_json(folder)
    config = _read(folder / "tokenizer_config.json")
    return TokenizerFiles(
        folder=folder,
        tokenizer=tokenizer,
        config=config,
        special=_read(folder / "special_tokens_map.json"),
        generation=_read(folder / "generation_config.json"),
        model=_read(folder / "config.json"),
        chat_template=_chat_template(folder, config),
    )


def _read(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(data, dict):
        raise BadInputError(f"{path}: a {type(data).__name__} where a JSON object belongs; restore the file")
    return data


def _chat_template(folder: Path, config: Json) -> str | None:
    """The template that the processor renders: its own file first, then the tokenizer's."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for source in (_read(folder / "chat_template.json"), _read(folder / "processor_config.json"), config):
        template = source.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None
