"""GPT-2's byte-level alphabet: every byte as one printable character."""

from __future__ import annotations

from functools import cache


@cache
def _bytes_of_symbols() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards, in order."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


def decode_symbols(text: str) -> str:
    """The text of a byte-level token; invalid UTF-8 (a part of a character) becomes U+FFFD."""
    table = _bytes_of_symbols()
    if any(symbol not in table for symbol in text):
        return text
    return bytes(table[symbol] for symbol in text).decode("utf-8", errors="replace")
