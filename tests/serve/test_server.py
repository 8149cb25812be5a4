"""The server under an OpenAI client, and under clients that mean no good."""

from __future__ import annotations

import base64
import http.client
import io
import json
import resource
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve.conftest import Parrot, Start, asked, data_url
from vlmexport.serve.limits import Limits
from vlmexport.serve.server import Server


def client(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="any", **{"max_retries": 0, **options}
    )


def post(server: Server, body: bytes, kind: str = "application/json", **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": kind, **headers})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def alive(server: Server) -> bool:
    reply = client(server).chat.completions.create(model="parrot", messages=asked("still here"))  # type: ignore[arg-type]
    return bool(reply.choices[0].message.content == "still here")


def test_an_openai_client_gets_an_answer_whole_and_streamed(start: Start) -> None:
    parrot = Parrot()
    server = start(parrot)
    api = client(server)
    assert [model.id for model in api.models.list()] == ["parrot"]
    messages: Any = [{"role": "system", "content": "Be brief. "}, *asked("Hello", data_url((8, 6)))]
    whole = api.chat.completions.create(model="x", messages=messages)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Be brief. Hello", "stop")
    assert whole.usage is not None
    assert whole.usage.total_tokens == 5
    pieces = list(
        api.chat.completions.create(model="x", messages=messages, stream=True, stream_options={"include_usage": True})
    )
    assert [p.choices[0].delta.content for p in pieces[:-2]] == ["", "Be brief. ", "Hello"]
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == "stop"
    assert pieces[-1].usage is not None
    chat, sizes = parrot.heard[-1]
    assert sizes == [(8, 6)]
    assert chat[1]["content"] == [{"type": "image"}, {"type": "text", "text": "Hello"}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_not_done_is_refused_and_never_ignored(change: dict[str, Any], param: str, start: Start) -> None:
    body = {"model": "x", "messages": asked("hi"), **change}
    status, answer = post(start(Parrot()), json.dumps(body).encode())
    assert (status, answer["error"]["param"]) == (400, param)


def test_bodies_that_are_no_requests_are_refused(start: Start) -> None:
    server = start(Parrot(), Limits(body_bytes=1000))
    assert post(server, b"{")[0] == 400
    assert post(server, b"[" * 900)[0] == 400
    assert post(server, b"{}", kind="text/plain")[0] == 415  # what a page elsewhere can send without asking
    assert post(server, b"x" * 1001)[0] == 413
    assert alive(server)


def bomb(width: int, height: int) -> str:
    """A PNG of some hundred bytes that says it has `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("urls", "status", "words"),
    [
        ([bomb(60_000, 60_000)], 400, "too many pixels"),
        ([bomb(12_000, 12_000)], 400, "the pictures have 144000000 pixels; the limit is 40000000"),
        ([bomb(5_000, 5_000), bomb(5_000, 5_000)], 400, "the pictures have 50000000 pixels"),
        ([bomb(300, 300)], 400, "is not a readable image"),
        (["data:image/png;base64,!!!"], 400, "not valid base64"),
        (["data:text/html,hello"], 400, "a data URL of a picture looks like"),
        ([data_url()] * 9, 400, "9 pictures in one request; the limit is 8"),
        (["ftp://x/y.png"], 400, "not ftp:"),
        (["file:///etc/passwd"], 400, "not file:"),
    ],
)  # fmt: skip
def test_pictures_beyond_the_limits_are_refused(urls: list[str], status: int, words: str, start: Start) -> None:
    server = start(Parrot())
    found, answer = post(server, json.dumps({"messages": asked("x", *urls)}).encode())
    assert (found, words in answer["error"]["message"]) == (status, True), answer
    assert alive(server)


def test_a_picture_of_50_mb_is_refused_before_it_is_read(start: Start) -> None:
    server = start(Parrot())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 68000000\r\n\r\n"
        )
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"the limit is 30000000" in answer
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes
    assert alive(server)


def test_a_hundred_at_once_are_all_answered_one_at_a_time(start: Start) -> None:
    parrot = Parrot()
    server = start(parrot)
    with ThreadPoolExecutor(100) as pool:
        api = client(server, timeout=60)
        wanted = [f"question {number}" for number in range(100)]
        replies = pool.map(
            lambda text: api.chat.completions.create(model="x", messages=asked(text, data_url())),  # type: ignore[arg-type]
            wanted,
        )
        assert [reply.choices[0].message.content for reply in replies] == wanted
    assert parrot.most == 1
    assert len(parrot.heard) == 100


def test_what_does_not_fit_is_told_to_come_back(start: Start) -> None:
    """None is lost: each of the hundred is answered, or refused with the time to wait."""
    hold = threading.Event()
    server = start(Parrot(hold=hold), Limits(waiting=10))
    with ThreadPoolExecutor(100) as pool:
        jobs = [pool.submit(post, server, json.dumps({"messages": asked(str(n))}).encode()) for n in range(100)]
        while sum(job.done() for job in jobs) < 80:
            threading.Event().wait(0.05)
        hold.set()
        answers = [job.result() for job in jobs]
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 11
    assert all("try again" in answer["error"]["message"] for status, answer in answers if status == 503)
    assert alive(server)


def test_bodies_that_wait_have_a_budget(start: Start) -> None:
    hold = threading.Event()
    server = start(Parrot(hold=hold), Limits(body_bytes=1000, waiting_bytes=1500))
    body = json.dumps({"messages": asked("x" * 800)}).encode()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, body)
        while not server.turns.waiting:
            threading.Event().wait(0.02)
        status, answer = post(server, body)
        assert (status, "as it has memory for" in answer["error"]["message"]) == (503, True)
        hold.set()
        assert first.result()[0] == 200


def test_a_client_that_says_nothing_is_let_go(start: Start) -> None:
    server = start(Parrot(), Limits(request_s=0.4))
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert raw.recv(100) == b""
    assert alive(server)


def test_a_client_that_goes_away_does_not_stop_the_others(start: Start) -> None:
    hold = threading.Event()
    server = start(Parrot(hold=hold))
    body = json.dumps({"messages": asked("x" * 100_000), "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        )  # fmt: skip
        while not server.turns.waiting:
            threading.Event().wait(0.02)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hold.set()
    assert alive(server)


def test_too_many_connections_are_closed(start: Start) -> None:
    server = start(Parrot(), Limits(connections=3))
    held = [socket.create_connection(("127.0.0.1", server.server_port), 10) for _ in range(3)]
    threading.Event().wait(0.3)
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as raw:
        assert raw.recv(10) == b""
    for one in held:
        one.close()
    threading.Event().wait(0.3)
    assert alive(server)


def test_a_name_that_is_not_this_machines_is_not_answered(start: Start) -> None:
    server = start(Parrot())
    status, answer = post(server, b"{}", Host="evil.example:80")
    assert (status, "localhost" in answer["error"]["message"]) == (403, True)


def test_the_page_loads_nothing_from_elsewhere(start: Start) -> None:
    server = start(Parrot())
    for path in ("/", "/page.js", "/page.css"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200
        assert "default-src 'none'" in (response.headers["Content-Security-Policy"] or "")
        assert "http://" not in text
        assert "https://" not in text
    for path in ("/../pyproject.toml", "/static/page.html", "/%2e%2e/x"):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == 404
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)


def events_of(server: Server, path: str) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("POST", path, json.dumps({"messages": asked("Hello")}), {"Content-Type": "application/json"})
    lines = io.StringIO(connection.getresponse().read().decode())
    connection.close()
    return [json.loads(line[6:]) for line in lines if line.strip()]


def test_the_side_by_side_stream(start: Start) -> None:
    events = events_of(start(Parrot()), "/api/compare")
    assert [event.get("text") for event in events] == ["", "Hello", None]
    assert events[-1]["timings"]["ttft_ms"] == 1.0


def test_the_page_can_ask_the_export_alone_and_is_told_why_there_is_no_original(start: Start) -> None:
    class TooLarge:
        asked = 0

        def why_not(self) -> str:
            self.asked += 1
            return "it does not fit"

    original = TooLarge()
    server = start(Parrot(), original=original)
    alone = events_of(server, "/api/ask")
    assert ([event.get("text") for event in alone], original.asked) == (["", "Hello", None], 0)
    assert events_of(server, "/api/compare")[-1] == {"side": "original", "error": "it does not fit"}


@pytest.mark.parametrize(
    "change",
    [
        {"stop": 5}, {"stop": True}, {"stream_options": "x"}, {"seed": 1.5}, {"temperature": 1e999},
        {"messages": asked("x", "https://[x/y.png")},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
        {"messages": [{"role": "user", "content": "x" * 1_000_001}]}, {"user": list(range(30_000))},
        {"verbosity": "low"}, {"verbosity": []},
    ],
)  # fmt: skip
def test_values_of_a_wrong_kind_are_refused_in_words(change: dict[str, Any], start: Start) -> None:
    status, answer = post(start(Parrot()), json.dumps({"messages": asked("hi"), **change}).encode())
    assert (status, bool(answer["error"]["message"])) == (400, True)


def test_values_that_clients_send_are_taken(start: Start) -> None:
    body = {"messages": asked("hi"), "seed": -1, "max_completion_tokens": None, "max_tokens": 5, "stop": None}
    assert post(start(Parrot()), json.dumps(body).encode())[0] == 200
    body |= {"verbosity": None, "audio": None, "function_call": None, "tools": None, "n": 1, "store": False}
    body |= {"metadata": {"a": "b"}, "user": "x", "prompt_cache_key": "y", "reasoning_effort": "none"}
    body["messages"] = [{"role": "user", "content": [
        {"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": data_url(), "detail": "low"}}
    ], "name": "me"}]  # fmt: skip
    assert post(start(Parrot()), json.dumps(body).encode())[0] == 200


def test_a_table_with_many_commas_is_an_ordinary_prompt(start: Start) -> None:
    parrot = Parrot()
    table = "1,2,3\n" * 10_001
    assert post(start(parrot), json.dumps({"messages": asked(table)}).encode())[0] == 200
    assert parrot.heard[0][0][0]["content"][0]["text"] == table


def test_requests_behind_a_streamed_answer_are_as_the_first(start: Start) -> None:
    """Their client has as much time to ask, and is told of an error of ours."""

    class Once(Parrot):
        def speak(self, *args: Any) -> Any:
            if self.heard:
                raise ZeroDivisionError("oops")
            return super().speak(*args)

    server = start(Once(), Limits(stalled_s=2.0))
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.connect()
    first = connection.sock
    for stream, status in ((True, 200), (False, 500)):
        body = json.dumps({"messages": asked("x"), "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert connection.sock is first
        response = connection.getresponse()
        answer = response.read()
        assert response.status == status
        threading.Event().wait(2.5 if stream else 0)  # longer than a client may stall
    assert b"internal error: ZeroDivisionError" in answer
    connection.close()


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "-1", ""])
def test_a_length_that_is_no_number_is_refused(length: str, start: Start) -> None:
    server = start(Parrot())
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as raw:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode("latin-1"))
        assert raw.recv(65536).startswith(b"HTTP/1.1 411 ")


def test_a_body_in_chunks_is_answered_and_the_connection_stays(start: Start) -> None:
    server = start(Parrot())
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    for text in ("one", "two"):
        body = json.dumps({"messages": asked(text)}).encode()
        pieces = iter([body[:7], body[7:]])
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", pieces, kind, encode_chunked=True)
        response = connection.getresponse()
        assert json.loads(response.read())["choices"][0]["message"]["content"] == text
    connection.close()
    status, answer = post(server, b"{}", **{"Transfer-Encoding": "gzip"})
    assert (status, "in chunks and nothing else" in answer["error"]["message"]) == (501, True)


def test_our_own_error_is_an_answer(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def speak(self, *args: Any) -> None:
            raise ZeroDivisionError("oops")

    status, answer = post(start(Broken()), json.dumps({"messages": asked("hi")}).encode())
    assert (status, answer["error"]["message"]) == (500, "internal error: ZeroDivisionError")
    assert "oops" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ICO", "TIFF", "PPM"])
def test_other_kinds_of_pictures_are_not_opened(kind: str, start: Start) -> None:
    from PIL import Image

    with io.BytesIO() as stream:
        Image.new("RGB", (16, 16)).save(stream, kind)
        url = f"data:image/x;base64,{base64.b64encode(stream.getvalue()).decode()}"
    status, answer = post(start(Parrot()), json.dumps({"messages": asked("x", url)}).encode())
    assert (status, "PNG, JPEG, WEBP, GIF, BMP" in answer["error"]["message"]) == (400, True)


def test_slow_bodies_hold_only_what_came_and_end(start: Start) -> None:
    server = start(Parrot(), Limits(request_s=1.0, waiting_bytes=40_000_000))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection(("127.0.0.1", server.server_port), 10) for _ in range(9)]
    for raw in slow:
        raw.sendall(head + b"Content-Length: 29000000\r\n\r\n{")
    assert alive(server)
    for _ in range(4):  # drips do not buy time
        threading.Event().wait(0.4)
        for raw in slow:
            try:
                raw.sendall(b" ")
            except OSError:
                continue
    for raw in slow:
        raw.settimeout(5)
        try:
            assert raw.recv(10) == b""
        except ConnectionError:
            continue
        finally:
            raw.close()
    assert alive(server)


def test_who_has_gone_gets_no_turn(start: Start) -> None:
    hold, parrot = threading.Event(), Parrot()
    parrot.hold = hold
    server = start(parrot)
    body = json.dumps({"messages": asked("x")}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    gone = []
    for count in range(1, 4):
        raw = socket.create_connection(("127.0.0.1", server.server_port), 10)
        raw.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        gone.append(raw)
        while server.turns.waiting < count:
            threading.Event().wait(0.02)
    for raw in gone:
        raw.close()
    hold.set()
    assert alive(server)
    assert len(parrot.heard) == 2  # the one that was talking, and the last question


def test_who_does_not_read_loses_the_turn(start: Start) -> None:
    class Talker(Parrot):
        def speak(self, messages: Any, pictures: Any, sampling: Any, on_text: Any) -> Any:
            if sampling.max_new_tokens == 1000:
                for _ in range(100_000):
                    on_text("x" * 1000)
            return super().speak(messages, pictures, sampling, on_text)

    server = start(Talker(), Limits(stalled_s=0.5))
    body = json.dumps({"messages": asked("x"), "stream": True, "max_tokens": 1000}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), 10) as raw:
        raw.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not server.turns.waiting:
            threading.Event().wait(0.02)
        assert alive(server)
