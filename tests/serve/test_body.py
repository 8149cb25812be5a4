"""A body as it arrives: what counts as a value, and what is refused before it is all there."""

from __future__ import annotations

import io
import json
import random
from email.message import Message
from typing import Any

import pytest

from vlmexport.serve.body import ValueCount, parsed, read_body
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError


def count(text: bytes, size: int = 1 << 18) -> int:
    counted = ValueCount()
    for start in range(0, len(text), size):
        counted.add(text[start : start + size])
    return counted.values


def headers(**given: str) -> Message:
    made = Message()
    made["Content-Type"] = "application/json"
    for name, value in given.items():
        made[name.replace("_", "-")] = value
    return made


def read(data: bytes, limits: Limits, **given: str) -> bytes:
    return bytes(read_body(io.BytesIO(data), headers(**given), limits, lambda size: None))


def plainly(text: bytes) -> int:
    """The same by a look at every byte."""
    found, inside, escaped = 0, False, False
    for byte in text:
        if inside:
            inside = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        else:
            inside = byte == ord('"')
            found += byte in b",[{"
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 18])
def test_values_are_counted_outside_texts_wherever_the_pieces_end(size: int) -> None:
    draw = random.Random(7)
    for _ in range(50):
        strings = ["".join(draw.choices('"\\,[{aé\n', k=draw.randrange(12))) for _ in range(4)]
        text = json.dumps({s: [s, {"x": s}, 1, None] for s in strings}, ensure_ascii=draw.random() < 0.5).encode()
        assert count(text, size) == plainly(text)


def test_a_text_of_commas_is_one_value_and_many_values_are_refused_before_the_end() -> None:
    limits = Limits(values=20_000)
    table = json.dumps({"text": "a,b,[c],{d}\n" * 20_001}).encode()
    assert json.loads(read(table, limits, Content_Length=str(len(table)))) == json.loads(table)
    for body in (b'{"x": [' + b"1," * 20_001, b"[" * 20_001, b'{"a":' * 20_001, b'["\\\\",' * 10_001):
        with pytest.raises(RefusedError, match="more than 20000 values") as refused:
            read(body, limits, Content_Length=str(len(body) + 1_000_000))  # the rest is not waited for
        assert refused.value.status == 400


def test_a_text_that_is_not_utf_8_is_refused() -> None:
    """As UTF-16 its quotation marks could be hidden from the count."""
    with pytest.raises(RefusedError, match="not valid JSON"):
        parsed(bytearray(json.dumps({"a": "\u0122"}, ensure_ascii=False).encode("utf-16")))
    assert parsed(bytearray('{"a": "\u0122"}'.encode())) == {"a": "\u0122"}


CHUNKS = b'4;name=x\r\n{"a"\r\n3\r\n:1}\r\n0\r\nTrailer: y\r\n\r\n'


def test_a_body_in_chunks_is_taken() -> None:
    taken: list[int] = []
    stream = io.BytesIO(CHUNKS + b"next")
    assert bytes(read_body(stream, headers(Transfer_Encoding="chunked"), Limits(), taken.append)) == b'{"a":1}'
    assert (taken, stream.read()) == ([4, 3], b"next")


@pytest.mark.parametrize(
    ("data", "given", "status", "words"),
    [
        (CHUNKS, {"Transfer_Encoding": "gzip, chunked"}, 501, "in chunks and nothing else"),
        (CHUNKS, {"Transfer_Encoding": "chunked", "Content_Length": "7"}, 501, "in chunks and nothing else"),
        (b"-4\r\n", {"Transfer_Encoding": "chunked"}, 400, "no size that is a number"),
        (b"f" * 11 + b"\r\n", {"Transfer_Encoding": "chunked"}, 400, "no size that is a number"),
        (b"1" * 2000, {"Transfer_Encoding": "chunked"}, 400, "is too long"),
        (b"1\r\nab\r\n", {"Transfer_Encoding": "chunked"}, 400, "longer than it says"),
        (b"65\r\n" + b" " * 101, {"Transfer_Encoding": "chunked"}, 413, "more than 100 bytes"),
        (b"32\r\n" + b" " * 50 + b"\r\n33\r\n", {"Transfer_Encoding": "chunked"}, 413, "more than 100 bytes"),
        (b"0\r\n" + b"x: y\r\n" * 101, {"Transfer_Encoding": "chunked"}, 400, "lines follow the body"),
        (b"x" * 101, {"Content_Length": "101"}, 413, "the limit is 100"),
    ],
)  # fmt: skip
def test_faulty_and_long_bodies_are_refused(data: bytes, given: dict[str, str], status: int, words: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read(data, Limits(body_bytes=100), **given)
    assert (refused.value.status, words in refused.value.message) == (status, True), refused.value.message


@pytest.mark.parametrize("given", [{"Transfer_Encoding": "chunked"}, {"Content_Length": "50"}])
def test_a_client_that_goes_away_in_the_middle_is_no_request(given: dict[str, Any]) -> None:
    with pytest.raises(ConnectionAbortedError):
        read(b"32\r\nab", Limits(), **given)
