"""A text that a wrong pre-tokenizer, a missing merge or a lost special token cannot get through unnoticed."""

from __future__ import annotations

from itertools import cycle

from vlmexport.lower.gguf.kinds import Kind
from vlmexport.lower.gguf.tokenizer_files import TokenizerFiles

# More special tokens than this are sampled: llama.cpp's search for them is quadratic.
MOST_ADDED = 2048

PIECES = (
    "Hello, world! What's in the picture? It's a red square; they're 3 circles, I'd say, you'll see we've DON'T",
    " a  b   c    d\te\n\nf \n g\r\n\r\n  h   ",
    "0 12 123 1234 12345.678 9,876,543 v2.10 3x 2024-11-21 1st x1y22z333",
    "naïve café Ünïcödé ÉCOLE straße Привет мир Ελληνικά עברית العربية हिन्दी ไทย",
    "你好，世界。日本語のテキスト、カタカナ 한국어 문장입니다",
    "😀👍🏽 🇫🇷 👨‍👩‍👧 ©™ € £ ½ ² → ∞ • … — “quotes” ‘single’",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2 != 3}  # comment\n\n\tif a<=b && c||d: i++;",
    "http://example.com/a_b-c?d=e&f=%20#top user@mail.org ~/path/to/file.txt C:\\dir",
    "CamelCase snake_case UPPERlower lowerUPPER !!! ??? ... --- === <b>bold</b> $x^2$ `code` @#%&*()",
    "\n",
    "\n\n",
    "\n\n\n",
    " ",
    "  ",
    "end",
)


def probe(files: TokenizerFiles, kind: Kind) -> tuple[str, tuple[int, ...]]:
    """The probe text with every added token between its pieces, and Hugging Face's ids of it (no automatic BOS/EOS)."""
    added = [token for token in files.added if not (kind.escapes_spaces and "▁" in token["content"])]
    step = -(-len(added) // MOST_ADDED) or 1
    pieces = cycle(PIECES)
    # Every piece occurs, with tokens between them as long as there are any.
    between = [str(token["content"]) for token in added[::step]]
    parts = [
        text
        for piece, token in zip(pieces, between + [""] * max(0, len(PIECES) - len(between)), strict=False)
        for text in (piece, token)
    ]
    text = "".join(parts)
    return text, tuple(files.fast.encode(text, add_special_tokens=False).ids)
