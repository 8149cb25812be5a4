"""The files of a checkpoint that say how text becomes token ids, read once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.model.json_files import read_json_if_there

Json = Mapping[str, Any]
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint's files say; absent files are empty.

    `fast` is the Hugging Face tokenizer, the reference for ids, without cutting and padding; `tokenizer` is the same as
    a parsed ``tokenizer.json``, which is not always the file (see `read_tokenizer_files`). `config`, `special`,
    `generation` and `model` are ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json`` and
    ``config.json``.
    """

    folder: Path
    fast: Tokenizer
    tokenizer: Json
    config: Json
    special: Json
    generation: Json
    model: Json
    chat_template: str | None

    @cached_property
    def added(self) -> tuple[Json, ...]:
        """The ``added_tokens`` entries in order of their ids."""
        return tuple(sorted(self.tokenizer.get("added_tokens") or (), key=lambda token: int(token["id"])))

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named tokens (``bos_token``, ``image_token``...) that transformers hands to a chat template."""
        named = {name for name in {**self.special, **self.config} if name.endswith("_token")}
        texts = {name: self.special_token(name.removesuffix("_token")) for name in named}
        return {name: text for name, text in texts.items() if text is not None}

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

    transformers is asked for the tokenizer, not the file: from version 5 its model classes (``LlamaTokenizer``,
    ``GemmaTokenizer``...) keep vocabulary and merges of ``tokenizer.json`` but build normalizer and pre-tokenizer
    themselves, and slow ones (``tokenizer.model``) have no such file. Raises `BadInputError` when there is no tokenizer
    or a file is broken, `NotPossibleHereError` when a package that reads a slow one is missing.
    """
    config = read_json_if_there(folder / "tokenizer_config.json")
    fast = _tokenizer_of(folder)
    fast.no_truncation()
    fast.no_padding()
    return TokenizerFiles(
        folder=folder,
        fast=fast,
        tokenizer=json.loads(fast.to_str()),
        config=config,
        special=read_json_if_there(folder / "special_tokens_map.json"),
        generation=read_json_if_there(folder / "generation_config.json"),
        model=read_json_if_there(folder / "config.json"),
        chat_template=_chat_template(folder, config),
    )


def _tokenizer_of(folder: Path) -> Tokenizer:
    found = [name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    if not found:
        raise BadInputError(f"{folder}: no tokenizer.json and no tokenizer.model; copy the tokenizer's files there")
    file = folder / "tokenizer.json"
    read_json_if_there(file)  # names the file where transformers would not
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask the user
    except Exception as error:  # `tokenizers` raises no narrower class
        # A class that transformers cannot load (custom code): its file is the best description left.
        if file.is_file():
            return _read_fast(file)
        if isinstance(error, ImportError) or (found[0] == "tokenizer.model" and not _reads_slow()):
            raise NotPossibleHereError(
                f"{folder}: transformers cannot read the slow tokenizer here ({_first_line(error)}); "
                "`pip install sentencepiece protobuf`, or save its tokenizer.json with save_pretrained elsewhere"
            ) from error
        raise BadInputError(
            f"{folder / found[0]}: transformers cannot read this tokenizer ({_first_line(error)}); restore the "
            "tokenizer's files, or save its tokenizer.json with save_pretrained"
        ) from error
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInputError(f"{folder}: {type(tokenizer).__name__} has no fast form; save one with its tokenizer.json")
    return backend


def _read_fast(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises no narrower class
        raise BadInputError(f"{file} is no tokenizer ({_first_line(error)}); restore the file") from error


def _reads_slow() -> bool:
    return importlib.util.find_spec("sentencepiece") is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _chat_template(folder: Path, config: Json) -> str | None:
    """The template that the processor renders: its own file first, then the tokenizer's."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for source in (
        read_json_if_there(folder / "chat_template.json"),
        read_json_if_there(folder / "processor_config.json"),
        config,
    ):
        template = source.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None
