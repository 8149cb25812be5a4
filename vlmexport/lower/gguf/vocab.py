"""The tokenizer of a checkpoint as GGUF metadata, for llama.cpp's own tokenizer to give the same ids.

Keys and meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and src/llama-vocab.cpp of llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.gguf.kinds import Kind, choose_kind
from vlmexport.lower.gguf.probe import probe
from vlmexport.lower.gguf.sentencepiece import SPACE
from vlmexport.lower.gguf.special_ids import special_metadata, special_texts
from vlmexport.lower.gguf.template import ImagePlace, TemplateResult, gguf_template
from vlmexport.lower.gguf.tokenizer_files import TokenizerFiles, read_tokenizer_files
from vlmexport.model.family import MetaValue
from vlmexport.runtime.llamacpp.prompt import image_place, prompt_builder, spaced_start, written_around

# Token types of llama.cpp (llama_token_type in llama.h).
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
# Scores of llama.cpp's converter for tokens that no merge makes, and for rows without a token.
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


@dataclass(frozen=True)
class Vocabulary:
    """All ``tokenizer.*`` keys in writing order, and a text with the ids that Hugging Face gives for it.

    `probe_ids` are without automatic BOS/EOS; llama.cpp's ``llama_tokenize`` (parse_special) must equal them.
    `template` says how the chat template was made to agree; None without a template. `notes` are known differences that
    no metadata can remove.
    """

    metadata: dict[str, MetaValue]
    probe_text: str
    probe_ids: tuple[int, ...]
    notes: tuple[str, ...]
    template: TemplateResult | None = None


@dataclass(frozen=True)
class _Token:
    text: str
    type: int
    score: float = 0.0


def read_vocabulary(folder: Path, arch: str, vocab_size: int) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder` for a text model `arch` with `vocab_size` embedding rows.

    Rows that no token has become ``[PAD<id>]``, as llama.cpp's converter names them. Raises `UnsupportedModelError`
    with the structure when llama.cpp has no tokenizer that gives the same ids, `BadInputError` without a tokenizer or
    with more tokens than rows.
    """
    files = read_tokenizer_files(folder)
    kind = choose_kind(files.tokenizer, frozenset(str(token["content"]) for token in files.added))
    tokens = _tokens(files, kind, vocab_size)
    special, special_notes = special_metadata(files, kind, [token.text for token in tokens])
    metadata: dict[str, MetaValue] = {
        "tokenizer.ggml.model": kind.model,
        "tokenizer.ggml.pre": kind.pre,
        "tokenizer.ggml.tokens": [token.text for token in tokens],
    }
    if kind.scores is not None:
        metadata["tokenizer.ggml.scores"] = [token.score for token in tokens]
    metadata["tokenizer.ggml.token_type"] = [token.type for token in tokens]
    if kind.merges is not None:
        metadata["tokenizer.ggml.merges"] = list(kind.merges)
    metadata |= special
    template = _chat_template(files, special_texts(metadata))
    template_notes: tuple[str, ...] = ()
    if template is not None:
        metadata["tokenizer.chat_template"] = template.text
        template_notes = () if template.agrees else (f"chat template: {template.reason}",)
    text, ids = probe(files, kind)
    notes = (*kind.notes, *_stripping_notes(files), *special_notes, *template_notes)
    return Vocabulary(metadata, text, ids, notes, template)


def _chat_template(files: TokenizerFiles, own: Mapping[str, str]) -> TemplateResult | None:
    """The template for llama.cpp, which hands it the special tokens `own`."""
    if files.chat_template is None:
        return None
    try:
        builder = prompt_builder(files.folder)
        start = partial(spaced_start, builder.tokenizer)
        place = ImagePlace(image_place(builder), *written_around(builder.processor), start)
    except (BadInputError, TemplateError) as error:
        return TemplateResult(files.chat_template, changed=False, agrees=False, reason=str(error))
    return gguf_template(files.chat_template, place, files.special_tokens, own)


def _tokens(files: TokenizerFiles, kind: Kind, vocab_size: int) -> list[_Token]:
    added = {int(token["id"]): token for token in files.added}
    known = {index: text for text, index in kind.vocabulary.items()}
    known |= {index: str(token["content"]) for index, token in added.items()}
    last = max(known, default=-1)
    if last >= vocab_size:
        raise BadInputError(
            f"{files.folder}: token {known[last]!r} has id {last}, the model's embedding table {vocab_size} rows; "
            "resize the model's embeddings or take the tokenizer that belongs to it"
        )
    tokens = [_token(index, known.get(index), added.get(index), kind) for index in range(vocab_size)]
    _refuse_twins(files.folder, tokens)
    return tokens


def _token(index: int, text: str | None, added: Mapping[str, Any] | None, kind: Kind) -> _Token:
    if text is None:
        return _Token(f"[PAD{index}]", UNUSED, _PADDING_SCORE)
    score = (kind.scores or {}).get(index, _ADDED_SCORE)
    if kind.is_byte(text):
        return _Token(text, BYTE, score)
    if added is None:
        return _Token(text, NORMAL, score)
    if added.get("special"):
        return _Token(text, CONTROL, score)
    if kind.escapes_spaces and SPACE in text:
        # Raw text has spaces where this has ▁, so Hugging Face never finds it there: it comes of the merges.
        return _Token(text, NORMAL, score)
    return _Token(text, USER_DEFINED, score)


def _refuse_twins(folder: Path, tokens: Sequence[_Token]) -> None:
    """llama.cpp aborts when two ids have one text."""
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token.text in seen:
            raise UnsupportedModelError(
                f"{folder}: ids {seen[token.text]} and {index} are both {token.text!r}; llama.cpp holds one id per text"
            )
        seen[token.text] = index


def _stripping_notes(files: TokenizerFiles) -> tuple[str, ...]:
    greedy = [str(t["content"]) for t in files.added if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]
    if not greedy:
        return ()
    shown = ", ".join(greedy[:4]) + (f" and {len(greedy) - 4} more" if len(greedy) > 4 else "")
    return (
        f"{shown}: Hugging Face swallows the spaces beside them (lstrip, rstrip) or wants them alone (single_word); "
        "llama.cpp does neither, so ids differ where a space touches one",
    )
