"""Which of llama.cpp's tokenizers a ``tokenizer.json`` is: byte-level BPE, or SentencePiece-like BPE with ``▁``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.gguf.pretokenizers import describe, find_pre_tokenizer, normalizer_steps, pre_tokenizer_steps

Json = Mapping[str, Any]
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Kind:
    """What `vocab` writes for one tokenizer.

    `vocabulary` maps ids to texts without added tokens. `merges` in rank order, `scores` by id; a kind has the one or
    the other. `space_prefix` is ``add_space_prefix`` where llama.cpp reads it. `escapes_spaces`: spaces are ``▁`` in
    texts.
    """

    model: str
    pre: str
    vocabulary: dict[int, str]
    merges: tuple[str, ...] | None = None
    scores: dict[int, float] | None = None
    space_prefix: bool | None = None
    escapes_spaces: bool = False
    unknown: int | None = None
    notes: tuple[str, ...] = ()

    padding_score = -10000.0

    def score(self, index: int) -> float:
        """The score of an id; added tokens rank below all others, as in llama.cpp's converter."""
        return -1000.0 if self.scores is None else self.scores.get(index, -1000.0)

    def type_of(self, text: str) -> int:
        """llama.cpp's token type of a text of the model's own vocabulary."""
        return 6 if self.escapes_spaces and _BYTE.fullmatch(text) else 1


def choose_kind(tokenizer: Json) -> Kind:
    """The kind of a parsed ``tokenizer.json``; raises `UnsupportedModelError` naming what llama.cpp lacks."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"tokenizer model {model['type']}: vlmexport writes BPE vocabularies for llama.cpp (byte-level or ▁); "
            "export with `vlmexport onnx` instead"
        )
    steps = pre_tokenizer_steps(tokenizer)
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedModelError(f"BPE with {option}={model[option]!r}: llama.cpp merges whole words without it")
    return _byte_level(tokenizer, steps)


def _byte_level(tokenizer: Json, steps: tuple[str, ...]) -> Kind:
    model = tokenizer["model"]
    normalizers = normalizer_steps(tokenizer)
    notes = []
    if normalizers == ("NFC",):
        notes.append("Hugging Face brings text to NFC first, llama.cpp does not: ids differ for decomposed characters")
    elif normalizers:
        raise UnsupportedModelError(
            f"normalizer {describe(normalizers)}: llama.cpp's BPE has none, token ids would differ"
        )
    pre = find_pre_tokenizer(steps, bool(model.get("ignore_merges")))
    if pre.caveat:
        notes.append(f"pre-tokenizer {pre.name}: {pre.caveat}")
    return Kind(
        model="gpt2",
        pre=pre.name,
        vocabulary={int(index): text for text, index in model["vocab"].items()},
        merges=tuple(merge_lines(model["merges"])),
        notes=tuple(notes),
    )


def merge_lines(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Merges as ``left right`` lines; byte-level symbols hold no space, so one is written as ``Ġ``."""
    return [m if isinstance(m, str) else " ".join(part.replace(" ", "Ġ") for part in m) for m in merges]
