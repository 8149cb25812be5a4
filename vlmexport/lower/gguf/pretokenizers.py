"""How a ``tokenizer.json`` cuts text before its merges, and which pre-tokenizer of llama.cpp does the same.

The choice is made by structure (the chain of ``pre_tokenizer`` steps, regular expressions included), never by a hash of
token ids, so that a vocabulary nobody has seen before works. The right-hand side of the table are the names that
``llm_load_vocab`` accepts for ``tokenizer.ggml.pre`` (llama.cpp b11549, src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import UnsupportedModelError

Json = Mapping[str, Any]

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(suffix: str, digits: str) -> str:
    """The o200k family: a word breaks where lower case meets upper case."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    return rf"{first}|{second}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


QWEN2 = f"{_CONTRACTION}|{_WORD}|" + r"\p{N}|" + f"{_PUNCTUATION}|{_TAIL}"
LLAMA3 = f"{_CONTRACTION}|{_WORD}|" + r"\p{N}{1,3}|" + f"{_PUNCTUATION}|{_TAIL}"
QWEN35 = f"{_CONTRACTION}|" + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
NO_CONTRACTIONS = f"{_WORD}|" + r"\p{N}|" + f"{_PUNCTUATION}|{_TAIL}"
MINICPM5 = f"{_CONTRACTION}|{_WORD}|" + r"\p{N}+|" + f"{_PUNCTUATION}|{_TAIL}"
SEED_CODER = f"{_CONTRACTION}|{_WORD}|" + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _TAIL
EXAONE_MOE = (
    f"{_CONTRACTION}|"
    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]+|\s+(?!\S)|\s+"
)
K2_HORIZON = (
    f"{_CONTRACTION}|" + r"[^\r\n\p{L}\p{N}]?(?:\p{L}|\p{M}|\u200C|\u200D)+|\p{N}{1,3}|" + f"{_PUNCTUATION}|{_TAIL}"
)
JAIS2 = f"{_CONTRACTION}|{_WORD}|" + r"\p{N}{1,3}|" + f"{_PUNCTUATION}|" + r"\s*[\r\n]+|"
JAIS2 += "".join(rf"\s{{{n}}}(?!\S)|" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"\s{1}"
TEKKEN = _cased_words("", r"\p{N}")
GPT4O = _cased_words(f"{_CONTRACTION}?", r"\p{N}{1,3}")
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _TAIL
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001
_CJK, _CJK_WIDE = "[一-龥぀-ゟ゠-ヿ]+", "[一-龥ࠀ-一가-퟿]+"  # noqa: RUF001

_BYTES = "ByteLevel"
_BYTES_GPT2 = "ByteLevel(regex)"


@dataclass(frozen=True)
class PreTokenizer:
    """One line of the table: `steps` are the HF steps (see `pre_tokenizer_steps`), `name` llama.cpp's.

    `ignore_merges`: llama.cpp takes a whole word that is in the vocabulary without looking at the merges.
    `caveat` says where the two are known to cut differently, `differs` which pieces of the probe show it.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    caveat: str = ""
    differs: frozenset[str] = frozenset()


def split(pattern: str) -> str:
    """The step of ``Split(Regex(pattern), Isolated)``."""
    return f"Split({pattern}, Isolated)"


# std::regex knows no categories: llama.cpp writes "upper case" as "a letter, not a-z" and leaves \p{M} out.
_CASE = "llama.cpp looks for a change of case among ASCII letters only: ids differ for words like ÉCOLE"
_CASE_AND_MARKS = f"{_CASE}, and where combining marks follow a letter (Devanagari, Thai)"
_WIDE_SPACE = "llama.cpp does not cut around the ideographic space U+3000: ids differ where one touches a word"

PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer("gpt-2", (_BYTES_GPT2,)),
    PreTokenizer("smollm", ("Digits(individual)", _BYTES_GPT2)),
    PreTokenizer("qwen2", (split(QWEN2), _BYTES)),
    PreTokenizer("qwen35", (split(QWEN35), _BYTES)),
    PreTokenizer("llama-bpe", (split(LLAMA3), _BYTES), ignore_merges=True),
    PreTokenizer("smaug-bpe", (split(LLAMA3), _BYTES)),
    PreTokenizer(
        "tekken",
        (split(TEKKEN), _BYTES),
        ignore_merges=True,
        caveat=_CASE_AND_MARKS,
        differs=frozenset({"capitals", "marks"}),
    ),
    PreTokenizer("gpt-4o", (split(GPT4O), _BYTES), caveat=_CASE_AND_MARKS, differs=frozenset({"capitals", "marks"})),
    PreTokenizer(
        "granite-embed-multi-97m",
        (split(GPT4O), _BYTES),
        ignore_merges=True,
        caveat=_CASE,
        differs=frozenset({"capitals"}),
    ),
    PreTokenizer("ufakzeka", (split(NO_CONTRACTIONS), _BYTES)),
    PreTokenizer("seed-coder", (split(SEED_CODER), _BYTES)),
    PreTokenizer("exaone-moe", (split(EXAONE_MOE), _BYTES)),
    PreTokenizer("jais-2", (split(JAIS2), _BYTES)),
    PreTokenizer("k2-horizon", (split(K2_HORIZON), _BYTES)),
    PreTokenizer("minicpm5", (split(r"\p{N}{1,3}"), split(MINICPM5), _BYTES), ignore_merges=True),
    PreTokenizer("laguna", (split(r"[^\n]+|[\n]+"), split(QWEN2), _BYTES)),
    PreTokenizer("deepseek-v3", (split(r"\p{N}{1,3}"), split(_CJK), split(DEEPSEEK3), _BYTES)),
    PreTokenizer(
        "deepseek-coder",
        (split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(_CJK_WIDE), "Digits(individual)", _BYTES),
        caveat=_WIDE_SPACE,
    ),
    PreTokenizer("bloom", (split(BLOOM), _BYTES)),
    PreTokenizer("viking", (split(BLOOM), "Digits(individual)", _BYTES)),
)


def pre_tokenizer_steps(tokenizer: Json) -> tuple[str, ...]:
    """The steps of a parsed ``tokenizer.json``'s ``pre_tokenizer`` in words, one string per step.

    Two spellings of one meaning give the same string: line breaks in regular expressions are escaped, a ``Split`` whose
    matches and gaps are both kept is "Isolated" with or without ``invert``.
    """
    return tuple(_step(step) for step in _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def normalizer_steps(tokenizer: Json) -> tuple[str, ...]:
    """The normalizers of a parsed ``tokenizer.json`` in words, one string per step."""
    return tuple(_normalizer(step) for step in _flatten(tokenizer.get("normalizer"), "normalizers"))


def find_pre_tokenizer(steps: tuple[str, ...], ignore_merges: bool) -> PreTokenizer:
    """The line of the table for `steps`, one with the same `ignore_merges` if there is one.

    Raises `UnsupportedModelError` naming the steps when llama.cpp has no pre-tokenizer that cuts like them.
    """
    found = [line for line in PRE_TOKENIZERS if line.steps == steps]
    if not found:
        raise UnsupportedModelError(
            f"pre-tokenizer {describe(steps)}: llama.cpp has no equivalent, its token ids would differ; "
            f"export with `vlmexport onnx` instead (it has those of {', '.join(line.name for line in PRE_TOKENIZERS)})"
        )
    return next((line for line in found if line.ignore_merges == ignore_merges), found[0])


# Spellings that match the same text. A possessive quantifier here only forbids a backtracking that cannot succeed, and
# \s* in front of [\r\n] already takes every line break but the last.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTION),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTION),
    (r"[^\r\n\p{L}\p{N}]?+\p{L}+", _WORD),
    (r" ?[^\s\p{L}\p{N}]++[\r\n]*", _PUNCTUATION),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
    (r"\p{N}{1}|", r"\p{N}|"),
)


def canonical(pattern: str) -> str:
    """One spelling for regular expressions that are known to match the same text."""
    for spelling, ours in _SPELLINGS:
        pattern = pattern.replace(spelling, ours)
    return pattern


def describe(steps: tuple[str, ...]) -> str:
    """`steps` in one line, as error messages show them."""
    return " > ".join(steps) or "none"


def _flatten(node: Json | None, key: str) -> Iterator[Json]:
    if node is None:
        return
    if node["type"] == "Sequence":
        for child in node[key]:
            yield from _flatten(child, key)
    else:
        yield node


def _step(step: Json) -> str:
    match step["type"]:
        case "ByteLevel":
            marks = ["regex"] * bool(step.get("use_regex", True)) + ["prefix"] * bool(step.get("add_prefix_space"))
            return f"ByteLevel({','.join(marks)})" if marks else "ByteLevel"
        case "Digits":
            return "Digits(individual)" if step.get("individual_digits") else "Digits(runs)"
        case "Punctuation":
            return f"Punctuation({step.get('behavior', 'Isolated')})"
        case "Split":
            return _split(step)
        case "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            return f"Metaspace({step.get('replacement', '▁')},{scheme}{',split' * bool(step.get('split', True))})"
        case name:
            return str(name)


def _split(step: Json) -> str:
    pattern = step["pattern"]
    text = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]).replace("\\ ", " ")
    behavior = step["behavior"]
    # What an inverted split calls the match is the gap; with both kept there is no difference. Removed gaps of a
    # pattern that leaves none are kept as well: GPT-4-like expressions end in \s+ and match everything.
    inverted = bool(step.get("invert")) and behavior != "Isolated"
    if inverted and behavior == "Removed" and text.endswith(r"|\s+"):
        behavior, inverted = "Isolated", False
    if behavior == "Isolated" and text == r"\p{N}":
        return "Digits(individual)"
    return f"Split({canonical(text)}, {behavior}{', inverted' * inverted})"


def _normalizer(step: Json) -> str:
    match step["type"]:
        case "Prepend":
            return f"Prepend({step['prepend']})"
        case "Replace":
            pattern = step["pattern"]
            return f"Replace({pattern.get('String', pattern.get('Regex'))!r},{step['content']!r})"
        case "Strip":
            return f"Strip({bool(step.get('strip_left'))},{bool(step.get('strip_right'))})"
        case name:
            return str(name)
