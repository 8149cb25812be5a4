"""What the server takes: sizes, counts and times. Everything that a request can grow has a limit here."""

from __future__ import annotations

from dataclasses import dataclass

_MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    `body_bytes` of one request and `waiting_bytes` of all that are read or waiting, with the pictures fetched for them;
    `values` of its JSON, `text_bytes` of its texts; `image_bytes` of a picture file, `pixels` of all pictures of a
    request, `images` of them. `waiting`: requests that wait for their turn; `wait_s`: how long. `fetch_s`: for a remote
    picture, from connecting to its last byte (its name is looked up before, in the time that the system takes for it).
    `request_s`: for a client to send its whole request. `stalled_s`: how long it may, in all, not take what it is sent.
    `connections` at once. `prompt_tokens` where the model has no number of positions; `new_tokens`: the longest answer.
    """

    body_bytes: int = 30 * _MB
    waiting_bytes: int = 250 * _MB
    values: int = 20_000
    text_bytes: int = _MB
    image_bytes: int = 20 * _MB
    pixels: int = 40 * _MB
    images: int = 8
    waiting: int = 128
    wait_s: float = 600.0
    fetch_s: float = 10.0
    request_s: float = 60.0
    stalled_s: float = 10.0
    connections: int = 256
    prompt_tokens: int = 131_072
    new_tokens: int = 4096
