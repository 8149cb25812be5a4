"""Small tokenizers of every structure, trained on text in which everything that a pre-tokenizer can cut occurs.

They are trained without a pre-tokenizer, so that their merges go across every place where one would cut: one that cuts
elsewhere gives other ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlmexport.lower.gguf.pretokenizers import PreTokenizer
from vlmexport.lower.gguf.probe import PIECES

SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
_WORDS = (
    *("don't", "I'll", "we've", "they're", "IT'S", "'S", " 'll", "hello", "World", "foo_bar", "x=1", "1st", "a1b2"),
    *("camelCase", "CamelCase", "lowerUPPER", "XMLHttp", "123", "1234", "12345678", "!=", "==", "...", "<|", "|>"),
    *("http://", "//", "naïve", "Élan", "élan", "привет", "Привет", "你好", "日本語", "カタカナ", "한국어", "हिन्दी"),
    *("  ", "   ", "\n\n", "\r\n", " \n", "\n ", "\t\t", "。\n", "²", "½", "😀", "👨\u200d👩\u200d👧"),
)
_CHARACTERS = " " * 8 + "\n\n\t\raabbcstremdlv'''012345!?.,;:-/_(){}[]<>$+=^~|`\"#%&*@ABCSTRéüñ"
_CHARACTERS += "жЯλ你好世界。→∞½²€“”…\u00a0ª"


def text(seed: int, parts: int) -> str:
    """`parts` random words, pieces of the probe and runs of characters."""
    rng = random.Random(seed)
    return "".join(_part(rng) for _ in range(parts))


def _part(rng: random.Random) -> str:
    match rng.randrange(10):
        case 0:
            return rng.choice([PIECES["code"], PIECES["english"], PIECES["whitespace"], PIECES["numbers"]])
        case 1 | 2 | 3:
            return "".join(rng.choice(_CHARACTERS) for _ in range(rng.randint(1, 5)))
        case _:
            return rng.choice(_WORDS) + rng.choice(["", " "])


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text(seed, 20) for seed in range(300)), trainer)
    return tokenizer.to_str()


def byte_level(pre_tokenizer: dict[str, Any], *, normalizer: Any = None, ignore_merges: bool = False) -> dict[str, Any]:
    """A byte-level BPE ``tokenizer.json`` with this pre-tokenizer."""
    data: dict[str, Any] = json.loads(_byte_level())
    data["model"]["ignore_merges"] = ignore_merges
    return {**data, "pre_tokenizer": pre_tokenizer, "normalizer": normalizer}


def as_json(line: PreTokenizer) -> dict[str, Any]:
    """The ``pre_tokenizer`` of a line of the table."""
    return {"type": "Sequence", "pretokenizers": [_step(step) for step in line.steps]}


def _step(step: str) -> dict[str, Any]:
    if step.startswith("Split("):
        pattern = step.removeprefix("Split(").removesuffix(", Isolated)")
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if step.startswith("Digits"):
        return {"type": "Digits", "individual_digits": "individual" in step}
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": "regex" in step}


@cache
def _spaced(complete: bool) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator((text(seed, 20) for seed in range(200)), trainer)
    data = json.loads(tokenizer.to_str())
    ids, merges = data["model"]["vocab"], [tuple(pair) for pair in data["model"]["merges"]]
    # Characters without a token, so that bytes stand in for them.
    texts = [t for t in sorted(ids, key=ids.__getitem__) if not set(t) & set("你ж☃")]
    texts[len(SPECIAL) : len(SPECIAL)] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {t: i for i, t in enumerate(texts)}
    data["model"]["vocab"] = vocabulary
    pairs = _all_splits(merges) if complete else iter(merges)
    data["model"]["merges"] = [list(pair) for pair in pairs if _known(pair, vocabulary)]
    data["decoder"] = json.loads(_DECODER)
    return json.dumps(data)


_DECODER = json.dumps(
    {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
)


def _known(pair: tuple[str, str], vocabulary: dict[str, int]) -> bool:
    return {pair[0], pair[1], pair[0] + pair[1]} <= vocabulary.keys()


def _all_splits(merges: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Every split of every piece in the order of pieces, as converters of SentencePiece models write them."""
    for piece in dict.fromkeys(left + right for left, right in merges):
        yield from ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))


def spaced(normalizer: Any, pre_tokenizer: Any, *, complete: bool) -> dict[str, Any]:
    """A SentencePiece-like ``tokenizer.json``; `complete`: with every split of a piece as a merge."""
    return {**json.loads(_spaced(complete)), "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


def save(tokenizer: dict[str, Any], folder: Path, **config: Any) -> int:
    """Write the files of a checkpoint's tokenizer; returns the number of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = tokenizer["model"]["vocab"]
    own = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values())
    return max(own, *(int(token["id"]) for token in tokenizer["added_tokens"])) + 1
