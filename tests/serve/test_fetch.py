"""Pictures from remote addresses: only allowed names, public addresses, no redirects, bounded in size and time."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vlmexport.serve import fetch as module
from vlmexport.serve.fetch import fetch
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

LIMITS = Limits(image_bytes=100_000, fetch_s=1.0)
HOST = "pictures.example"


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
        fetch(url, [HOST], LIMITS, resolve)
    assert words in refused.value.message


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.9.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"],
)  # fmt: skip
def test_an_allowed_name_with_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(RefusedError, match="an address that is not public"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, lambda host, port: ["93.184.216.34", address])


def test_a_name_that_is_not_found_is_refused() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    with pytest.raises(RefusedError, match="is not found"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, resolve)


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
    assert fetch(f"https://{HOST.upper()}/x.png?a=b", [HOST], LIMITS, public) == b"picture"


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
        fetch(f"https://{HOST}/{path}", [HOST], LIMITS, public)
    assert words in refused.value.message


def test_the_certificate_is_the_hosts_and_the_address_the_checked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Context:
        def wrap_socket(self, plain: Any, server_hostname: str) -> Any:
            asked["name"] = server_hostname
            return plain

    def connect(address: tuple[str, int], timeout: float) -> str:
        asked["address"] = address
        return "socket"

    connection = module._Pinned(HOST, 443, "93.184.216.34", 1.0)
    connection._context_of = Context()  # type: ignore[assignment]
    monkeypatch.setattr(module.socket, "create_connection", connect)
    connection.connect()
    assert asked == {"name": HOST, "address": ("93.184.216.34", 443)}


@pytest.mark.parametrize(
    "address", ["64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "::127.0.0.1", "fec0::1", "2001::1"]
)
def test_addresses_that_stand_for_others_are_not_public(address: str) -> None:
    with pytest.raises(RefusedError, match="an address that is not public"):
        fetch(f"https://{HOST}/x.png", [HOST], LIMITS, lambda host, port: [address])
