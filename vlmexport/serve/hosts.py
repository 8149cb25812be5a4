"""Who may talk to a server of this machine, and where it can listen."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from vlmexport.errors import BadInputError

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
_Server = TypeVar("_Server")


def host_name(header: str) -> str:
    """The name in a ``Host`` header, in lower case and without the port."""
    name, _, port = header.rpartition(":")
    return (name if port.isdigit() else header).lower()


def listening(make: Callable[[], _Server], host: str, port: int, choices: str) -> _Server:
    """The server that `make` makes for `host` and `port`.

    Raises `BadInputError` where it cannot listen there; `choices` are the options that choose another place.
    """
    try:
        return make()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "something else listens there" if taken else error.strerror or str(error)
        raise BadInputError(f"cannot listen on {host}:{port}: {reason}; choose another {choices}") from error
