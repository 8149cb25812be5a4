"""The body of a request: taken in as it arrives, in one piece or in chunks, and no more of it than the limits allow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from email.message import Message
from io import BufferedIOBase
from typing import Any

from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

Take = Callable[[int], None]
_PIECE = 1 << 18
# Of the lines around chunks: their sizes, and what may follow the last.
_LINE, _TRAILERS = 1000, 100


def read_body(stream: BufferedIOBase, headers: Message, limits: Limits, take: Take) -> bytearray:
    """The body of a request with these headers; `take` is told the size of every piece before it is kept.

    Raises `RefusedError` for another type, without a length that is a number (unless it comes in chunks), and beyond
    `Limits.body_bytes` or `Limits.values`; `ConnectionAbortedError` where the client goes away in the middle.
    """
    if headers.get_content_type() != "application/json":
        raise RefusedError(415, "the body must be application/json")
    body, count = bytearray(), ValueCount()
    for piece in _pieces(stream, headers, limits.body_bytes):
        take(len(piece))
        count.add(piece)
        if count.values > limits.values:
            raise RefusedError(400, f"the body has more than {limits.values} values, which is the limit")
        body += piece
    return body


def parsed(body: bytearray) -> Any:
    """The JSON value in `body`, which is UTF-8. Raises `RefusedError`."""
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not valid JSON: {error}") from error


class ValueCount:
    """Counts about how many values a JSON text has, piece by piece: `values`, commas and brackets outside its strings.

    Needs memory for one piece, and time in its length. A text that is not UTF-8 is counted wrongly.
    """

    def __init__(self) -> None:
        self.values = 0
        self._inside = False
        self._left = b""

    def add(self, piece: bytes) -> None:
        """Count the next piece of the text."""
        text = (self._left + piece).replace(b"\\\\", b"")
        self._left = b"\\" if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[int(self._inside) :: 2])
        self._inside ^= len(parts) % 2 == 0
        self.values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")


def _pieces(stream: BufferedIOBase, headers: Message, limit: int) -> Iterator[bytes]:
    if "Transfer-Encoding" in headers:
        codings = [coding.strip().lower() for coding in headers.get_all("Transfer-Encoding", [])]
        if codings != ["chunked"] or "Content-Length" in headers:
            raise RefusedError(501, "a body comes with Content-Length here, or in chunks and nothing else")
        return _chunks(stream, limit)
    text = headers.get("Content-Length", "")
    if not re.fullmatch("[0-9]{1,12}", text):
        raise RefusedError(411, "the request has no Content-Length that is a number")
    if int(text) > limit:
        raise RefusedError(413, f"the body has {text} bytes; the limit is {limit}")
    return _exactly(stream, int(text))


def _exactly(stream: BufferedIOBase, length: int) -> Iterator[bytes]:
    while length:
        piece = stream.read(min(length, _PIECE))
        if not piece:
            raise ConnectionAbortedError
        yield piece
        length -= len(piece)


def _chunks(stream: BufferedIOBase, limit: int) -> Iterator[bytes]:
    """The chunks of a body, to the last and the lines behind it."""
    total = 0
    while size := _chunk_size(stream):
        total += size
        if total > limit:
            raise RefusedError(413, f"the body has more than {limit} bytes, which is the limit")
        yield from _exactly(stream, size)
        if _line(stream):
            raise RefusedError(400, "a chunk of the body is longer than it says")
    for _ in range(_TRAILERS):
        if not _line(stream):
            return
    raise RefusedError(400, f"more than {_TRAILERS} lines follow the body")


def _chunk_size(stream: BufferedIOBase) -> int:
    text = _line(stream).partition(b";")[0].strip()
    if not re.fullmatch(b"[0-9A-Fa-f]{1,10}", text):
        raise RefusedError(400, "a chunk of the body has no size that is a number")
    return int(text, 16)


def _line(stream: BufferedIOBase) -> bytes:
    line = stream.readline(_LINE)
    if not line:
        raise ConnectionAbortedError
    if not line.endswith(b"\r\n"):
        raise RefusedError(400, "a line between the chunks of the body is too long, or has no end")
    return line[:-2]
