"""Token ids to text as they come: whole characters only, and never a piece of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"
# Text that a later token can still change is at most a few tokens long; earlier ones are not decoded again.
_WINDOW = 8


class TextStream:
    """Decodes one answer incrementally.

    A character of several tokens appears when its last token is there. Text that may be the beginning of a stop text
    is held back until that is decided; `stopped` is True once one was found (it is not part of the text).
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._start = 0
        self._read = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; the new text that can be shown now (often empty)."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        whole = self._decode(self._ids[self._start :])
        if whole.endswith(_INCOMPLETE):
            return ""
        # Decoding from a few tokens back keeps the spaces that tokenizers drop at the start of a text.
        self._start, self._read = max(self._start, len(self._ids) - _WINDOW), len(self._ids)
        return self._show(whole[len(before) :])

    def finish(self) -> str:
        """The text that was still held back, at the end of the answer."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._held + self._decode(self._ids[self._start :])[len(before) :]
        self._held, self._read = "", len(self._ids)
        self.text += rest
        return rest

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _show(self, new: str) -> str:
        pending = self._held + new
        found = [place for s in self._stop if (place := pending.find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = pending[: min(found)], ""
        else:
            held = _held_length(pending, self._stop)
            shown, self._held = pending[: len(pending) - held], pending[len(pending) - held :]
        self.text += shown
        return shown


def _held_length(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop text."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
