"""Fetch a picture from a remote address that the user allowed by name; anything else is refused.

No redirects. The host must be on the list; its name is resolved once, every address must be public, and the connection
goes to the very address that was checked (a name that resolves to something else a moment later changes nothing).
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

_CHUNK = 1 << 16
# How often an end is tried again: the connection may have had no socket yet.
_AGAIN_S = 0.05
_PARAM = "messages"
# Addresses of IPv6 that stand for one of IPv4, or for a place inside.
_TUNNELS = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10"))
)
# Host and port to the addresses that the name stands for.
Resolve = Callable[[str, int], list[str]]


def fetch(
    url: str, allowed: Collection[str], limits: Limits, take: Callable[[int], None], resolve: Resolve | None = None
) -> bytes:
    """The bytes at `url`; `take` is told the size of each piece before it is kept, and may raise to end it.

    Raises `RefusedError` (400) for everything that is not a plain answer of an allowed host.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
    except ValueError as error:
        raise _refused("the address is not valid") from error
    if parts.scheme != "https":
        raise _refused(f"pictures come as data URLs or from https addresses, not {parts.scheme or 'nothing'}:")
    if parts.username is not None or parts.password is not None:
        raise _refused("an address with a user name is not fetched")
    if host not in {name.lower() for name in allowed}:
        raise _refused(f"the host {host!r} is not on the list of this server (--allow-host); send a data URL")
    try:
        port = parts.port or 443
    except ValueError as error:
        raise _refused("the address has no valid port") from error
    address = public_address(host, port, resolve or _resolve)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _get(host, port, address, target, limits, take)


def public_address(host: str, port: int, resolve: Resolve) -> str:
    """An address of `host`, all of which must be public. Raises `RefusedError`."""
    try:
        found = resolve(host, port)
    except OSError as error:
        raise _refused(f"the host {host!r} is not found") from error
    if not found or not all(_is_public(address) for address in found):
        raise _refused(f"the host {host!r} has an address that is not public")
    return found[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if any(parsed in network for network in _TUNNELS if network.version == parsed.version):
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_global and not (mapped or parsed).is_multicast


def _resolve(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _Pinned(http.client.HTTPSConnection):
    """HTTPS to one address, with the certificate of `host`."""

    def __init__(self, host: str, port: int, address: str, timeout: float) -> None:
        self._context_of = ssl.create_default_context()
        super().__init__(host, port, timeout=timeout, context=self._context_of)
        self._address = address

    def connect(self) -> None:
        # Each socket is in its place before anything is waited for on it, so that `_cut` can end it.
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._context_of.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock.do_handshake()


class _Deadline:
    """Ends a connection from outside after `seconds`, whatever it waits for then; `late` says that it did."""

    def __init__(self, connection: http.client.HTTPConnection, seconds: float) -> None:
        self.connection, self._seconds = connection, seconds
        self._socket: socket.socket | None = None
        self._late, self._done = threading.Event(), threading.Event()

    def __enter__(self) -> _Deadline:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.connection.close()

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return self._late.is_set()

    def keep(self) -> None:
        """Remember the socket: a connection lets go of it while its answer is still read."""
        self._socket = self.connection.sock

    def _watch(self) -> None:
        if self._done.wait(self._seconds):
            return
        self._late.set()
        while not self._done.is_set():
            if (found := self._socket or self.connection.sock) is not None:
                with suppress(OSError):
                    # Not the method of SSL sockets: that makes a plain one of what another thread still reads.
                    socket.socket.shutdown(found, socket.SHUT_RDWR)
            self._done.wait(_AGAIN_S)


def _get(host: str, port: int, address: str, target: str, limits: Limits, take: Callable[[int], None]) -> bytes:
    with _Deadline(_Pinned(host, port, address, limits.fetch_s), limits.fetch_s) as deadline:
        try:
            data = bytearray()
            for piece in _pieces(deadline, target, limits, take):
                data += piece
            return bytes(data)
        except (OSError, ValueError, http.client.HTTPException) as error:
            late = f"took longer than {limits.fetch_s:g} s"
            raise _refused(f"{host} {late if deadline.late else f'gave no picture: {type(error).__name__}'}") from error


def _pieces(deadline: _Deadline, target: str, limits: Limits, take: Callable[[int], None]) -> Iterator[bytes]:
    """What the host sends, piece by piece; raises `TimeoutError` as soon as it is late."""
    connection, total = deadline.connection, 0
    connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "vlmexport"})
    deadline.keep()
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise _refused(f"{connection.host} answered {response.status}; redirects are not followed")
    while True:
        piece = response.read1(_CHUNK)
        if deadline.late:
            raise TimeoutError
        if not piece:
            return
        total += len(piece)
        if total > limits.image_bytes:
            raise _refused(f"the picture at {connection.host} has more than {limits.image_bytes} bytes")
        take(len(piece))
        yield piece


def _refused(message: str) -> RefusedError:
    return RefusedError(400, message, _PARAM)
