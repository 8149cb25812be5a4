"""A text that a wrong pre-tokenizer, a missing merge or a lost special token cannot get through unnoticed."""

from __future__ import annotations

from itertools import zip_longest

from vlmexport.lower.gguf.kinds import Kind
from vlmexport.lower.gguf.sentencepiece import SPACE
from vlmexport.lower.gguf.tokenizer_files import TokenizerFiles

# More added tokens than this are sampled evenly: llama.cpp's search for them is quadratic.
MOST_ADDED = 2048

PIECES = {
    "english": "Hello, world! What's in the picture? It's a red square; they're 3 circles, you'll see I'd WE'VE DON'T",
    "whitespace": " a  b   c    d\te\n\nf \n g\r\n\r\n  h   ",
    "numbers": "0 12 123 1234 12345.678 9,876,543 v2.10 3x 2024-11-21 1st x1y22z333",
    "letters": "naïve café Ünïcödé straße Привет мир Ελληνικά עברית العربية",
    "capitals": "ÉCOLE cafÉ ПРИВЕТ приВет ÀÉÎ",
    "marks": "हिन्दी ไทย தமிழ்",
    "cjk": "你好，世界。日本語のテキスト、カタカナ 한국어 문장입니다",  # noqa: RUF001
    "symbols": "😀👍🏽 🇫🇷 👨‍👩‍👧 ©™ € £ ½ ² → ∞ • … — “quotes” ‘single’",  # noqa: RUF001
    "code": "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2 != 3}  # comment\n\n\tif a<=b && c||d: i++;",
    "addresses": "http://example.com/a_b-c?d=e&f=%20#top user@mail.org ~/path/to/file.txt C:\\dir",
    "punctuation": "CamelCase snake_case UPPERlower lowerUPPER !!! ??? ... --- === <b>bold</b> $x^2$ `code` @#%&*()",
    "line": "\n",
    "two lines": "\n\n",
    "three lines": "\n\n\n",
    "space": " ",
    "two spaces": "  ",
    "end": "end",
}


def probe(files: TokenizerFiles, kind: Kind) -> tuple[str, tuple[int, ...]]:
    """The probe text with every added token between its pieces, and Hugging Face's ids of it (no automatic BOS/EOS).

    Left out is only what `kind.notes` say to differ: the pieces `kind.differs`, and spaces at the edges of pieces where
    they matter.
    """
    pieces = [_edges(text, kind) for name, text in PIECES.items() if name not in kind.differs]
    added = [str(token["content"]) for token in files.added if not (kind.escapes_spaces and SPACE in token["content"])]
    between = added[:: -(-len(added) // MOST_ADDED) or 1]
    pieces *= max(1, -(-len(between) // len(pieces)))
    parts = [part for pair in zip_longest(pieces, between, fillvalue="") for part in pair]
    text = ("" if kind.space_prefix is None else " " * (not kind.space_prefix)) + "".join(parts)
    return text, tuple(files.fast.encode(text, add_special_tokens=False).ids)


def _edges(text: str, kind: Kind) -> str:
    return text.strip(" ") or "end" if kind.space_sensitive else text
