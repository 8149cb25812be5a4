"""A request that is not served, in the form that OpenAI's clients understand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class RefusedError(Exception):
    """`status` is the HTTP status, `message` one line for a person, `param` the key that is wrong (or empty).

    `retry_s`: ask again after so many seconds (0: it will not help).
    """

    status: int
    message: str
    param: str = ""
    retry_s: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param or None, "code": None}}
