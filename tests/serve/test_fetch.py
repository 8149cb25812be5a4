"""Pictures from remote addresses: only allowed names, public addresses, no redirects, bounded in size and time."""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from tests.serve.conftest import Parrot, Start, asked
from tests.serve.test_server import post
from vlmexport.serve import fetch as module
from vlmexport.serve.fetch import fetch
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

LIMITS = Limits(image_bytes=100_000, fetch_s=1.0)
HOST = "pictures.example"


def nothing(size: int) -> None:
    """Room for everything."""


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://pictures.example/x.png", "not http:"),
        ("https://other.example/x.png", "'other.example' is not on the list"),
        ("https://pictures.example.evil.org/x.png", "is not on the list"),
        ("https://pictures.example@evil.org/x.png", "with a user name"),
        ("https://evil.org#pictures.example", "is not on the list"),
        ("https://127.0.0.1/x.png", "is not on the list"),
        ("https://[::1]/x.png", "is not on the list"),
        ("https://pictures.example:99999/x", "no valid port"),
    ],
)
def test_other_addresses_are_refused_before_anything_is_asked(url: str, words: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host}:{port} was looked up")

    with pytest.raises(RefusedError) as refused:
        fetch(url, [HOST], LIMITS, nothing, resolve)
    assert words in refused.value.message


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.9.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"],
)  # fmt: skip
def test_an_allowed_name_with_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(RefusedError, match="an address that is not public"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, nothing, lambda host, port: ["93.184.216.34", address])


def test_a_name_that_is_not_found_is_refused() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    with pytest.raises(RefusedError, match="is not found"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, nothing, resolve)


class _Site(BaseHTTPRequestHandler):
    """A picture, a redirect to the machine itself, too much, and something that never ends."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/large":
                self.wfile.write(b"x" * 200_000)
            elif self.path == "/slow":
                for _ in range(50):
                    self.wfile.write(b"x")
                    threading.Event().wait(0.1)
            else:
                self.wfile.write(b"picture")
        except OSError:
            return


class _Album(BaseHTTPRequestHandler):
    """One picture of some thousand bytes."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        picture = io.BytesIO()
        Image.frombytes("RGB", (40, 40), random.Random(1).randbytes(4800)).save(picture, "PNG")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture.getvalue())


def test_what_waits_with_fetched_pictures_has_the_budget_of_bodies(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = ThreadingHTTPServer(("127.0.0.1", 0), _Album)
    threading.Thread(target=album.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "_Pinned", lambda *args: http.client.HTTPConnection("127.0.0.1", album.server_port))
    monkeypatch.setattr(module, "_resolve", public)
    hold = threading.Event()
    server = start(Parrot(hold=hold), Limits(waiting_bytes=7000), (HOST,))
    body = json.dumps({"messages": asked("x", f"https://{HOST}/x.png")}).encode()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server, body)
        while not server.turns.waiting:
            threading.Event().wait(0.02)
        status, answer = post(server, body)
        hold.set()
        assert (status, "as it has memory for" in answer["error"]["message"]) == (503, True)
        assert first.result()[0] == 200
    assert post(server, body)[0] == 200  # what was held is given back
    album.shutdown()
    album.server_close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The site stands for every address; without TLS, which is the only thing that differs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def plain(host: str, port: int, address: str, timeout: float) -> http.client.HTTPConnection:
        assert (host, port, address) == (HOST, 443, "93.184.216.34")
        return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)

    monkeypatch.setattr(module, "_Pinned", plain)
    yield
    server.shutdown()
    server.server_close()


def public(host: str, port: int) -> list[str]:
    return ["93.184.216.34"]


@pytest.mark.usefixtures("site")
def test_a_picture_is_fetched_from_the_address_that_was_checked() -> None:
    assert fetch(f"https://{HOST.upper()}/x.png?a=b", [HOST], LIMITS, nothing, public) == b"picture"


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("redirect", "answered 302; redirects are not followed"),
        ("large", "has more than 100000 bytes"),
        ("slow", "took longer than 1 s"),
    ],
)
def test_what_is_no_plain_picture_is_refused(path: str, words: str) -> None:
    with pytest.raises(RefusedError) as refused:
        fetch(f"https://{HOST}/{path}", [HOST], LIMITS, nothing, public)
    assert words in refused.value.message


def test_the_certificate_is_the_hosts_and_the_address_the_checked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Secure:
        def do_handshake(self) -> None:
            asked["can be ended"] = connection.sock is self

    class Context:
        def wrap_socket(self, plain: Any, server_hostname: str, do_handshake_on_connect: bool) -> Any:
            asked["name"], asked["waits"] = server_hostname, do_handshake_on_connect
            return Secure()

    def connect(address: tuple[str, int], timeout: float) -> str:
        asked["address"] = address
        return "socket"

    connection = module._Pinned(HOST, 443, "93.184.216.34", 1.0)
    connection._context_of = Context()  # type: ignore[assignment]
    monkeypatch.setattr(module.socket, "create_connection", connect)
    connection.connect()
    assert asked == {"name": HOST, "waits": False, "can be ended": True, "address": ("93.184.216.34", 443)}


def dripping(first: bytes, done: threading.Event) -> int:
    """A port where one client is sent `first`, then a zero every 0.1 s for a minute at most; `done` when it was all."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        client, _ = listener.accept()
        with listener, client, suppress(OSError):
            client.recv(65536)
            client.sendall(first)
            for _ in range(600):
                client.sendall(b"\0")
                threading.Event().wait(0.1)
            done.set()

    threading.Thread(target=drip, daemon=True).start()
    return int(listener.getsockname()[1])


def test_the_time_holds_for_the_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a socket that waits for ever: only what ends it from outside can."""
    all_sent = threading.Event()
    port = dripping(b"\x16\x03\x03\x40\x00\x02", all_sent)
    real = socket.create_connection
    monkeypatch.setattr(module.socket, "create_connection", lambda address, timeout: real(("127.0.0.1", port)))
    with pytest.raises(RefusedError, match="took longer than 1 s"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, nothing, public)
    assert not all_sent.is_set()


def test_the_time_holds_for_an_answer_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection has let go of its socket by then."""
    all_sent = threading.Event()
    port = dripping(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", all_sent)
    monkeypatch.setattr(module, "_Pinned", lambda *args: http.client.HTTPConnection("127.0.0.1", port))
    with pytest.raises(RefusedError, match="took longer than 1 s"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, nothing, public)
    assert not all_sent.is_set()


@pytest.mark.usefixtures("site")
def test_what_is_fetched_is_told_piece_by_piece_and_can_be_refused() -> None:
    told: list[int] = []
    fetch(f"https://{HOST}/x.png", [HOST], LIMITS, told.append, public)
    assert sum(told) == len(b"picture")

    def full(size: int) -> None:
        raise RefusedError(503, "no room")

    with pytest.raises(RefusedError, match="no room"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, full, public)


@pytest.mark.parametrize(
    "address", ["64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "::127.0.0.1", "fec0::1", "2001::1"]
)
def test_addresses_that_stand_for_others_are_not_public(address: str) -> None:
    with pytest.raises(RefusedError, match="an address that is not public"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, nothing, lambda host, port: [address])
