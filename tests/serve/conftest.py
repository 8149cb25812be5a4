"""A server around an engine that answers at once, on a free port."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from vlmexport.serve.engine import Messages, Spoken
from vlmexport.serve.limits import Limits
from vlmexport.serve.server import Server, Service

Start = Callable[..., Server]


@dataclass
class Parrot:
    """Says what it was asked, word by word, and counts how many talk at once; `hold` makes it wait."""

    hold: threading.Event | None = None
    heard: list[tuple[Messages, list[tuple[int, int]]]] = field(default_factory=list)
    talking: int = 0
    most: int = 0

    def speak(
        self, messages: Messages, pictures: Sequence[Any], sampling: Any, on_text: Callable[[str], None]
    ) -> Spoken:
        """The texts of the chat."""
        self.talking += 1
        self.most = max(self.most, self.talking)
        try:
            if self.hold is not None:
                self.hold.wait(30)
            self.heard.append((messages, [picture.size for picture in pictures]))
            words = [part["text"] for m in messages for part in m["content"] if part["type"] == "text"]
            for word in words[: sampling.max_new_tokens]:
                on_text(word)
            return Spoken("".join(words), "stop", 3, len(words), {"ttft_ms": 1.0, "decode_tok_s": 2.0})
        finally:
            self.talking -= 1


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server: ``start(engine, limits=…, allowed_hosts=…, original=…)``."""
    running: list[Server] = []

    def make(
        engine: Any, limits: Limits | None = None, allowed_hosts: tuple[str, ...] = (), original: Any = None
    ) -> Server:
        service = Service("parrot", engine, {"words": "a parrot"}, original, allowed_hosts, limits or Limits())
        server = Server(("127.0.0.1", 0), service)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield make
    for server in running:
        server.shutdown()
        server.server_close()


def data_url(size: tuple[int, int] = (8, 6), colour: tuple[int, int, int] = (200, 10, 10)) -> str:
    """A PNG of one colour."""
    with io.BytesIO() as stream:
        Image.new("RGB", size, colour).save(stream, "PNG")
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def asked(text: str, *urls: str) -> list[dict[str, Any]]:
    """One user's message."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
