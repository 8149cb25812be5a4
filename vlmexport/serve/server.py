"""The HTTP server: the page, ``/v1/chat/completions`` and ``/v1/models``. Standard library, a thread for each client.

What is bounded: connections, time of a silent client, size of a body, bytes and number of requests that wait, and what
a picture may be (`Limits`). One answer is made at a time. Only names of this machine are answered where the server
listens on it alone: a page elsewhere cannot reach it through a name of its own (DNS rebinding). A client that does not
take what it is sent, or is gone, loses its turn.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from vlmexport.errors import VlmExportError
from vlmexport.serve.body import parsed, read_body
from vlmexport.serve.chat import ChatRequest, Reply, parse_request
from vlmexport.serve.compare import Original
from vlmexport.serve.engine import Engine
from vlmexport.serve.hosts import LOCAL_NAMES, host_name
from vlmexport.serve.limits import Limits
from vlmexport.serve.pictures import decoded, picture_files
from vlmexport.serve.refusal import RefusedError
from vlmexport.serve.turns import Turns

_PIECE = 1 << 18
_LINGER_S, _LINGER_BYTES = 3.0, 100_000_000
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


@dataclass(frozen=True)
class Service:
    """What the server serves: an engine under a name, and the original beside it (None: not asked for)."""

    name: str
    engine: Engine
    facts: dict[str, Any]
    original: Original | None = None
    allowed_hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


class Server(ThreadingHTTPServer):
    """Listens at once; `serve_forever` answers. Port 0 takes a free one (`server_port`)."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], service: Service) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.service = service
        self.turns = Turns(service.limits)
        self.local = address[0] in LOCAL_NAMES
        self._free = threading.BoundedSemaphore(service.limits.connections)
        self._reading: dict[socket.socket, float] = {}
        super().__init__(address, _Handler)
        threading.Thread(target=self._watch, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the client, or none where there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The client's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def reads(self, client: socket.socket, *, done: bool) -> None:
        """A client begins to send its request, or has sent it: until then it has `Limits.request_s`."""
        if done:
            self._reading.pop(client, None)
        else:
            self._reading[client] = time.monotonic() + self.service.limits.request_s

    def _watch(self) -> None:
        """Let clients go that take too long to say what they want, however they stretch it."""
        while self.fileno() >= 0:
            time.sleep(min(self.service.limits.request_s / 4, 1.0))
            now = time.monotonic()
            for client, end in list(self._reading.items()):
                if now > end:
                    with suppress(OSError):
                        client.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    streaming = False
    server_version = "vlmexport"
    sys_version = ""
    server: Server

    def handle_one_request(self) -> None:
        """One request, which has to arrive in time."""
        self.streaming = False
        self.connection.settimeout(self.server.service.limits.request_s)
        self.server.reads(self.connection, done=False)
        try:
            super().handle_one_request()
        finally:
            self.server.reads(self.connection, done=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked is the user's."""

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            self._check_host()
            work()
        except RefusedError as refusal:
            self._refuse(refusal)
        except (ConnectionError, TimeoutError):
            raise
        # The border of the server: whatever is left is our bug, and becomes an answer and a line in the log.
        except Exception as error:
            self.close_connection = True
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if not self.streaming:
                self._refuse(RefusedError(500, f"internal error: {type(error).__name__}"))

    def _check_host(self) -> None:
        name = host_name(self.headers.get("Host", ""))
        if self.server.local and name not in LOCAL_NAMES:
            raise RefusedError(403, f"this server answers to localhost, not to {name!r}")

    def _get(self) -> None:
        self.server.reads(self.connection, done=True)
        self.close_connection |= self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        path = self.path.partition("?")[0]
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(200, resources.files("vlmexport.serve").joinpath("static", name).read_bytes(), kind)
        elif path == "/v1/models":
            model = {"id": self.server.service.name, "object": "model", "created": 0, "owned_by": "vlmexport"}
            self._json(200, {"object": "list", "data": [model]})
        elif path == "/health":
            self._json(200, {"status": "ok", "waiting": self.server.turns.waiting})
        elif path == "/api/info":
            compares = self.server.service.original is not None
            self._json(200, {"name": self.server.service.name, "compares": compares, **self.server.service.facts})
        else:
            raise RefusedError(404, f"there is no {path} here")

    def _post(self) -> None:
        path = self.path.partition("?")[0]
        answers = {"/v1/chat/completions": self._complete, "/api/compare": self._compare, "/api/ask": self._ask}
        if path not in answers:
            raise RefusedError(404, f"there is no {path} here")
        with self.server.turns.room() as take:
            request, files = self._arrived(take)
            with self.server.turns.turn():
                self.stop_if_gone()
                answers[path](request, files)

    def _arrived(self, take: Callable[[int], None]) -> tuple[ChatRequest, tuple[bytes, ...]]:
        """The request, all of it, and its pictures' files; they stand for its `urls`, which it holds no more."""
        service = self.server.service
        body = parsed(read_body(self.rfile, self.headers, service.limits, take))
        self.server.reads(self.connection, done=True)
        request = parse_request(body, service.limits)
        del body
        files = picture_files(request.urls, service.allowed_hosts, service.limits, take)
        return replace(request, urls=()), files

    def stop_if_gone(self) -> None:
        """Raise `ConnectionAbortedError` when the client has hung up: nobody waits for the rest of the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def _complete(self, request: ChatRequest, files: tuple[bytes, ...]) -> None:
        service, pictures = self.server.service, decoded(files)
        reply = Reply.of(service.name)
        if not request.stream:
            gone = self.stop_if_gone
            spoken = service.engine.speak(request.messages, pictures, request.sampling, lambda text: gone())
            self._json(200, reply.whole(spoken.text, spoken.finish, spoken.usage))
            return
        events = _Events(self, lambda: reply.chunk({"role": "assistant", "content": ""}))
        try:
            spoken = service.engine.speak(
                request.messages, pictures, request.sampling, lambda text: events.send(reply.chunk({"content": text}))
            )
        except RefusedError as refusal:
            if not events.begun:
                raise
            events.send(refusal.to_dict())
            events.end()
            return
        events.send(reply.chunk({}, spoken.finish))
        if request.usage_in_stream:
            events.send(reply.usage(spoken.usage))
        events.end("[DONE]")

    def _ask(self, request: ChatRequest, files: tuple[bytes, ...]) -> None:
        """As `_compare`, of the export alone."""
        self._tell_sides(request, files, None)

    def _compare(self, request: ChatRequest, files: tuple[bytes, ...]) -> None:
        """Events ``{"side", "text"}`` while answers come, ``{"side", "timings"}`` after each, then ``{"parts"}``."""
        self._tell_sides(request, files, self.server.service.original)

    def _tell_sides(self, request: ChatRequest, files: tuple[bytes, ...], original: Original | None) -> None:
        service, pictures = self.server.service, decoded(files)
        events = _Events(self, lambda: {"side": "export", "text": ""})
        sides: list[tuple[str, Any]] = [("export", service.engine)]
        if original is not None:
            sides.append(("original", original))
        try:
            for side, speaker in sides:
                if speaker is original and original is not None and (why := original.why_not()):
                    events.send({"side": side, "error": why})
                    break
                tell = _tell(events, side)
                spoken = speaker.speak(request.messages, pictures, request.sampling, tell)
                events.send({"side": side, "timings": spoken.timings, "finish": spoken.finish, **spoken.usage})
            else:
                if original is not None:
                    parts = original.differences(service.engine, request.messages, pictures)
                    events.send({"parts": [asdict(part) for part in parts]})
        except (RefusedError, VlmExportError) as error:
            if not events.begun and isinstance(error, RefusedError):
                raise
            events.send({"error": getattr(error, "message", "") or str(error)})
        events.end()

    def _refuse(self, refusal: RefusedError) -> None:
        self.close_connection = True  # what is left of the body is not read
        headers = {"Retry-After": str(refusal.retry_s)} if refusal.retry_s else {}
        self._json(refusal.status, refusal.to_dict(), headers)
        self._linger()

    def _linger(self) -> None:
        """Take in a little of what the client still sends, so that it comes to read the answer."""
        end, left = time.monotonic() + _LINGER_S, _LINGER_BYTES
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER_S / 2)
            while left > 0 and time.monotonic() < end and (piece := self.connection.recv(_PIECE)):
                left -= len(piece)

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(HTTPStatus(status))
        self.common_headers(kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def common_headers(self, kind: str) -> None:
        """Of every answer: its type, and that a browser may load nothing from elsewhere for it."""
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")


class _Events:
    """Server-sent events in HTTP chunks; the headers go out with the first, so that a refusal can come before it."""

    def __init__(self, handler: _Handler, first: Callable[[], dict[str, Any]]) -> None:
        self._handler, self._first = handler, first
        self._stalled = 0.0
        self.begun = False

    def send(self, data: dict[str, Any]) -> None:
        """One event."""
        if not self.begun:
            self.begun = True
            handler = self._handler
            handler.streaming = True
            handler.connection.settimeout(handler.server.service.limits.stalled_s)
            handler.send_response(HTTPStatus.OK)
            handler.common_headers("text/event-stream")
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            self.send(self._first())
        self._line(json.dumps(data))

    def end(self, last: str = "") -> None:
        """The end of the stream, after the line `last`."""
        if last:
            self._line(last)
        self._handler.wfile.write(b"0\r\n\r\n")

    def _line(self, text: str) -> None:
        event = f"data: {text}\n\n".encode()
        start = time.monotonic()
        self._handler.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        self._stalled += time.monotonic() - start
        if self._stalled > self._handler.server.service.limits.stalled_s:
            raise TimeoutError  # a client that does not read holds up everybody else
        self._handler.stop_if_gone()


def _tell(events: _Events, side: str) -> Callable[[str], None]:
    return lambda text: events.send({"side": side, "text": text})
