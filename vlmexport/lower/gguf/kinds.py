"""Which of llama.cpp's tokenizers a ``tokenizer.json`` is: byte-level BPE, or SentencePiece-like BPE with ``▁``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.models import BPE

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.gguf import sentencepiece as spm
from vlmexport.lower.gguf.pretokenizers import (
    PreTokenizer,
    describe,
    find_pre_tokenizer,
    normalizer_steps,
    pre_tokenizer_steps,
)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What `vocab` writes for one tokenizer.

    `vocabulary` maps texts to ids, without added tokens. `merges` in rank order, `scores` by id; a kind has the one or
    the other. `space_prefix` is ``add_space_prefix`` where llama.cpp reads it. `escapes_spaces`: spaces are ``▁`` in
    texts. `differs` are names of probe pieces whose ids a note already says to differ, `space_sensitive` the same of
    spaces beside special tokens.
    """

    model: str
    pre: str
    vocabulary: dict[str, int]
    merges: tuple[str, ...] | None = None
    scores: dict[int, float] | None = None
    space_prefix: bool | None = None
    escapes_spaces: bool = False
    differs: frozenset[str] = frozenset()
    space_sensitive: bool = False
    notes: tuple[str, ...] = ()

    def is_byte(self, text: str) -> bool:
        """True for the token of one byte of an unknown character."""
        return self.escapes_spaces and spm.BYTE.fullmatch(text) is not None


def choose_kind(tokenizer: Json, added: frozenset[str]) -> Kind:
    """The kind of a parsed ``tokenizer.json`` with these `added` token texts.

    Raises `UnsupportedModelError` naming the structure that llama.cpp lacks.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"tokenizer model {model.get('type')}: llama.cpp's BPE tokenizers are all that vlmexport writes; "
            "export with `vlmexport onnx` instead"
        )
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedModelError(f"BPE with {option}={model[option]!r}: llama.cpp's BPE has no such marks")
    normalizers, steps = normalizer_steps(tokenizer), pre_tokenizer_steps(tokenizer)
    spacing = spm.find_spacing(normalizers, steps)
    if spacing is not None:
        return _sentencepiece(model, spacing, added)
    return _byte_level(model, normalizers, steps, added)


def _byte_level(model: Json, normalizers: tuple[str, ...], steps: tuple[str, ...], added: frozenset[str]) -> Kind:
    notes = []
    if normalizers == ("NFC",):
        notes.append("Hugging Face brings text to NFC first, llama.cpp does not: ids differ for decomposed characters")
    elif normalizers:
        raise UnsupportedModelError(
            f"normalizer {describe(normalizers)} before {describe(steps)}: llama.cpp's BPE normalizes nothing, "
            "its token ids would differ; export with `vlmexport onnx` instead"
        )
    pre = find_pre_tokenizer(steps, bool(model.get("ignore_merges")))
    if pre.caveat:
        notes.append(f"pre-tokenizer {pre.name}: {pre.caveat}")
    notes.extend(_whole_words(model, pre, added))
    return Kind(
        model="gpt2",
        pre=pre.name,
        vocabulary=dict(model["vocab"]),
        merges=tuple(merge_lines(model["merges"])),
        differs=pre.differs,
        notes=tuple(notes),
    )


def _whole_words(model: Json, pre: PreTokenizer, added: frozenset[str]) -> tuple[str, ...]:
    """A note when llama.cpp takes whole words from the vocabulary and Hugging Face does not, or the other way round."""
    if bool(model.get("ignore_merges")) == pre.ignore_merges:
        return ()
    plain = BPE(vocab=model["vocab"], merges=_pairs(model["merges"]))
    words = (text for text in model["vocab"] if len(text) > 1 and text not in added)
    other = [word for word in words if len(plain.tokenize(word)) > 1]
    if not other:
        return ()
    shown = ", ".join(repr(text) for text in other[:4])
    verb = "takes them whole" if pre.ignore_merges else "does not take them whole"
    return (f"{len(other)} words of the vocabulary ({shown}) are not what the merges make of them; llama.cpp {verb}",)


def _sentencepiece(model: Json, spacing: spm.Spacing, added: frozenset[str]) -> Kind:
    vocabulary = {text: index for text, index in model["vocab"].items() if text not in added}
    everything = dict(model["vocab"])
    merges = _pairs(model["merges"])
    lacking = spm.missing_bytes(everything)
    if not model.get("byte_fallback") or lacking:
        raise UnsupportedModelError(
            f"BPE with {spm.SPACE} for spaces and without byte tokens ({len(lacking)} of 256 <0x..> are missing): "
            "llama.cpp needs them for characters that the vocabulary lacks; export with `vlmexport onnx` instead"
        )
    if spacing.words and (crossing := spm.crosses_words(vocabulary)) is not None:
        raise UnsupportedModelError(
            f"words are split at {spm.SPACE} but {crossing!r} is a token: llama.cpp does not split such a vocabulary; "
            "export with `vlmexport onnx` instead"
        )
    crossing = spm.crosses_lines(merges)
    scores = spm.scores_of_merges(everything, merges, added)
    if scores is not None or (not spacing.prefix and crossing is None):
        by_merges = scores is None
        return Kind(
            model="gpt2" if by_merges else "llama",
            pre="sarvam-moe" if by_merges else "default",
            vocabulary=everything,
            merges=tuple(f"{left} {right}" for left, right in merges) if by_merges else None,
            scores=scores,
            space_prefix=spacing.prefix,
            escapes_spaces=True,
            space_sensitive=spacing.prefix and bool(spacing.note),
            notes=(spacing.note,) if spacing.note else (),
        )
    reason = f"the token {crossing!r} goes across a line break" if crossing else "it puts a space before each text"
    raise UnsupportedModelError(
        f"BPE with {spm.SPACE} for spaces whose merges do not follow from scores, and {reason}: llama.cpp has no "
        "tokenizer for that; export with `vlmexport onnx` instead"
    )


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    split = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [(pair[0], pair[1]) for pair in split]


def merge_lines(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Merges as ``left right`` lines; byte-level symbols hold no space, so one is written as ``Ġ``."""
    return [m if isinstance(m, str) else " ".join(part.replace(" ", "Ġ") for part in m) for m in merges]
