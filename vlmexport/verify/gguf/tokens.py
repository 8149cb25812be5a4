"""Does llama.cpp cut text into the model's tokens, and has it the tokens that it writes around pictures by itself?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmexport.runtime.llamacpp.image_tokens import PROJECTOR_TOKENS
from vlmexport.runtime.llamacpp.prompt import spaced_start
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.files import GgufPair
from vlmexport.verify.gguf.structure import projector_type

_PLAIN = (
    "Hello, world! It's 12345678 o'clock; 3.14 + 0.5 = 3.64.",
    "  two  spaces,\ttab,\nline\n\nlines\n\n\nmore   ",
    "naïve café — Ελληνικά, русский, 中文字符, 日本語, 한국어, العربية, हिन्दी, ไทย, 🙂👍🏽",
    "def f(x):\n    return x**2  # snake_case CamelCase don't WE'LL\r\n",
    "a  b   c    d\u00a0e\u200b_f",
)
_SHOWN = 20


def probe_texts(tokenizer: Any) -> list[str]:
    """Texts that tell tokenizers apart: plain ones of many scripts, and every added token between words."""
    added = sorted(tokenizer.get_added_vocab(), key=lambda token: int(tokenizer.get_added_vocab()[token]))
    runs = [added[start : start + _SHOWN] for start in range(0, len(added), _SHOWN)]
    texts = [*_PLAIN, *("".join(f"x{token}" for token in run) + " end" for run in runs)]
    return [spaced_start(tokenizer, text) for text in texts]


def check_tokenizer(
    gate: Gate, runner: LlamaCppRunner, tokenizer: Any | None, recorded: tuple[str, Sequence[int]] | None
) -> None:
    """``tokenizer/ids``: the ids of probe texts are those of the model's own `tokenizer`.

    `recorded` is the probe of an export with the ids that it promised; without a `tokenizer` it alone is judged.
    """
    faults = []
    if recorded is not None and recorded[0]:
        faults += _faults(recorded[0], runner, list(recorded[1]))
        if tokenizer is not None and _own_ids(tokenizer, recorded[0]) != list(recorded[1]):
            faults.append("the ids that the export recorded are not those of the model's tokenizer")
    for text in probe_texts(tokenizer) if tokenizer is not None else ():
        faults += _faults(text, runner, _own_ids(tokenizer, text))
    if recorded is None and tokenizer is None:
        gate.not_run(
            "tokenizer/ids", "processor", "lowering", "neither the model nor an export says what ids to expect"
        )
        return
    gate.verdict("tokenizer/ids", "processor", "lowering", faults, "texts that differ")


def _own_ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _faults(text: str, runner: LlamaCppRunner, wanted: list[int]) -> list[str]:
    found = runner.tokenize(text, special=False)
    if found == wanted:
        return []
    same = next(
        (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
    )
    ours, theirs = found[same : same + 4], wanted[same : same + 4]
    return [f"{text[:40]!r}: from token {same} llama.cpp has {ours}, the model {theirs}"]


def check_written_tokens(gate: Gate, pair: GgufPair) -> None:
    """``tokenizer/image_tokens``: the tokens that llama.cpp writes around pictures itself are in the vocabulary.

    What is missing it silently leaves out, or writes as the pieces of its name.
    """
    projector = projector_type(pair.mmproj)
    wanted = PROJECTOR_TOKENS.get(projector)
    if wanted is None:
        reason = f"not known here what llama.cpp writes around the pictures of a {projector or 'nameless'} projector"
        gate.not_run("tokenizer/image_tokens", "processor", "lowering", reason)
        return
    known = set(pair.text.tokens)
    faults = [
        f"{token!r} is not one token of the vocabulary, and llama.cpp writes it around every picture; add it to the "
        "tokenizer and export again"
        for token in (*wanted.looked_up, *wanted.written)
        if not known & _spellings(token)
    ]
    gate.verdict("tokenizer/image_tokens", "processor", "lowering", faults, "tokens")


def _spellings(token: str) -> set[str]:
    """How a vocabulary may hold the token: as it is, in the letters of byte-level BPE, as a byte of SentencePiece."""
    letters = "".join(chr(ord(c) + 256) if ord(c) < 33 else c for c in token)
    byte = {f"<0x{ord(token):02X}>"} if len(token) == 1 and ord(token) < 128 else set()
    return {token, letters} | byte
