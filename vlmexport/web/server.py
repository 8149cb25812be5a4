"""The local server of a site: files that the site names, with the headers that WebAssembly threads need."""

from __future__ import annotations

import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote

from vlmexport.serve.hosts import LOCAL_NAMES, host_name, listening
from vlmexport.web.site import Site

HOST = "127.0.0.1"
_IDLE_S = 60
_PIECE = 1 << 20
_ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}


class SiteServer(ThreadingHTTPServer):
    """Listens on this machine alone, at once; `serve_forever` answers. Port 0 takes a free one (`server_port`)."""

    daemon_threads = True

    def __init__(self, port: int, site: Site) -> None:
        self.site = site
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def start_server(site: Site, port: int) -> SiteServer:
    """A server of `site`, listening; raises `BadInputError` when `port` is taken."""
    return listening(lambda: SiteServer(port, site), HOST, port, "--port")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "vlmexport"
    sys_version = ""
    timeout = _IDLE_S
    server: SiteServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked is the user's."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if host_name(self.headers.get("Host", "")) not in LOCAL_NAMES:
            return self._send(403, ".txt", *_text("this server answers to localhost alone\n"), with_body)
        name = unquote(self.path.partition("?")[0]).removeprefix("/") or "index.html"
        source = self.server.site.files.get(name)
        if source is None:
            return self._send(404, ".txt", *_text("there is no such file here\n"), with_body)
        if isinstance(source, bytes):
            return self._send(200, PurePosixPath(name).suffix, BytesIO(source), len(source), with_body)
        try:
            file, size = source.open("rb"), source.stat().st_size
        except OSError:
            return self._send(404, ".txt", *_text("the file is gone since the server was started\n"), with_body)
        with file:
            self._send(200, PurePosixPath(name).suffix, file, size, with_body)

    def _send(self, status: int, suffix: str, body: BinaryIO, size: int, with_body: bool) -> None:
        """The file `body` of `size` bytes, or the part of it that was asked for."""
        first, end = (0, size) if status != 200 else _range(self.headers.get("Range", ""), size)
        self.send_response(206 if end - first < size else status)
        plain = "text/plain" if status != 200 else "application/octet-stream"
        self.send_header("Content-Type", _TYPES.get(suffix, plain))
        self.send_header("Content-Length", str(end - first))
        if end - first < size:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        for name, value in (self.server.site.headers | _ALWAYS).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            body.seek(first)
            self._copy(body, end - first)

    def _copy(self, body: BinaryIO, left: int) -> None:
        while left and (piece := body.read(min(left, _PIECE))):
            self.wfile.write(piece)
            left -= len(piece)
        if left:  # the file became shorter: the length that was said no longer holds
            self.close_connection = True


def _range(asked: str, size: int) -> tuple[int, int]:
    """First and end byte of the one range that `asked` names; the whole file for what is no such range."""
    found = re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", asked)
    if found is None:
        return 0, size
    first, end = int(found[1]), min(size, int(found[2] or size) + 1)
    return (first, end) if first < end else (0, size)


def _text(words: str) -> tuple[BinaryIO, int]:
    data = words.encode()
    return BytesIO(data), len(data)
