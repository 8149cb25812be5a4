"""SentencePiece-like BPE (spaces are ``▁``, unknown characters are bytes ``<0x..>``): Llama 2, Mistral 7B, Gemma.

llama.cpp has two tokenizers for them. ``llama`` joins the pair of neighbours whose result has the best *score* and so
needs every way of splitting a piece to be a merge; ``gpt2`` with the pre-tokenizer ``sarvam-moe`` follows the *merges*
but cuts at line breaks and adds no space in front. Which of them gives Hugging Face's ids is read off the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_REPLACE = f"Replace(' ','{SPACE}')"


@dataclass(frozen=True)
class Spacing:
    """How a structure treats the space in front of a text.

    `prefix`: llama.cpp's ``add_space_prefix``, which puts one before the text and after every special token. `note`
    says where Hugging Face does otherwise. `words`: merges never cross a ``▁``.
    """

    prefix: bool
    note: str = ""
    words: bool = False


_ALWAYS = (
    "Hugging Face puts a space before a text, and after every special token, unless one is there; llama.cpp puts one "
    "there even so: ids differ after a special token that a space follows"
)
_FIRST = (
    "Hugging Face puts a space before the very first word of a prompt that begins with plain text; llama.cpp would put "
    "one after every special token too, so there is none: write it into such a prompt (the chat template does)"
)
# (normalizer steps, pre-tokenizer steps) -> what they mean.
_SPACINGS: dict[tuple[tuple[str, ...], tuple[str, ...]], Spacing] = {
    ((f"Prepend({SPACE})", _REPLACE), ()): Spacing(prefix=True),
    ((_REPLACE,), ()): Spacing(prefix=False),
    ((_REPLACE,), ("Split( , MergedWithPrevious)",)): Spacing(prefix=False),
    ((), (f"Metaspace({SPACE},never)",)): Spacing(prefix=False),
    ((), (f"Metaspace({SPACE},first)",)): Spacing(prefix=False, note=_FIRST),
    ((), (f"Metaspace({SPACE},always)",)): Spacing(prefix=True, note=_ALWAYS),
    ((), (f"Metaspace({SPACE},never,split)",)): Spacing(prefix=False, words=True),
    ((), (f"Metaspace({SPACE},first,split)",)): Spacing(prefix=False, note=_FIRST, words=True),
    ((), (f"Metaspace({SPACE},always,split)",)): Spacing(prefix=True, note=_ALWAYS, words=True),
}


def find_spacing(normalizers: tuple[str, ...], steps: tuple[str, ...]) -> Spacing | None:
    """The meaning of these normalizer and pre-tokenizer steps; None when they are no SentencePiece."""
    return _SPACINGS.get((normalizers, steps))


def missing_bytes(vocabulary: Mapping[str, int]) -> list[str]:
    """Byte tokens that are not there; llama.cpp stops with an exception when it needs one of them."""
    return sorted(_BYTES - vocabulary.keys())


def crosses_words(vocabulary: Mapping[str, int]) -> str | None:
    """A token with a ``▁`` after its first character, None if there is none."""
    return next((text for text in vocabulary if SPACE in text[1:] and text.strip(SPACE)), None) or next(
        (text for text in vocabulary if len(text) > 1 and not text.strip(SPACE)), None
    )


def crosses_lines(merges: Sequence[tuple[str, str]]) -> str | None:
    """A merge result that holds a line break and something else, None if there is none."""
    return next((a + b for a, b in merges if "\n" in a + b and (a + b).strip("\n")), None)


def scores_of_merges(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: frozenset[str]
) -> dict[int, float] | None:
    """Scores by id with which llama.cpp's search for the best score equals these merges; None when there are none.

    There are some when every way of splitting a piece into two is a merge and the merges of one piece follow each
    other: SentencePiece's own models are like that, tokenizers trained by Hugging Face are not. `added` tokens that no
    merge makes are no pieces.
    """
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last and piece in ranks:
            return None
        ranks.setdefault(piece, len(ranks))
        last = piece
    known = set(merges)
    pieces = {text for text in vocabulary if text in ranks or (text not in added and not BYTE.fullmatch(text))}
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in pieces and pair[1] in pieces and pair not in known:
                return None
    return {vocabulary[piece]: -float(rank) for piece, rank in ranks.items() if piece in vocabulary}
