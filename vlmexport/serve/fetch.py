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
from collections.abc import Callable, Collection
from contextlib import suppress
from urllib.parse import urlsplit

from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

_CHUNK = 1 << 16
_PARAM = "messages"
# Host and port to the addresses that the name stands for.
# Addresses of IPv6 that stand for one of IPv4, or for a place inside.
_TUNNELS = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10"))
)
Resolve = Callable[[str, int], list[str]]


def fetch(url: str, allowed: Collection[str], limits: Limits, resolve: Resolve | None = None) -> bytes:
    """The bytes at `url`. Raises `RefusedError` (400) for everything that is not a plain answer of an allowed host."""
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
    return _get(host, port, address, target, limits)


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
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._context_of.wrap_socket(plain, server_hostname=self.host)


def _get(host: str, port: int, address: str, target: str, limits: Limits) -> bytes:
    connection = _Pinned(host, port, address, limits.fetch_s)
    late = threading.Event()
    timer = threading.Timer(limits.fetch_s, _cut, (connection, late))
    timer.start()
    try:
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "vlmexport"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise _refused(f"{host} answered {response.status}; redirects are not followed")
        data = bytearray()
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > limits.image_bytes:
                raise _refused(f"the picture at {host} has more than {limits.image_bytes} bytes")
        if late.is_set():
            raise _refused(f"{host} took longer than {limits.fetch_s:g} s")
        return bytes(data)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = (
            f"took longer than {limits.fetch_s:g} s" if late.is_set() else f"gave no picture: {type(error).__name__}"
        )
        raise _refused(f"{host} {reason}") from error
    finally:
        timer.cancel()
        connection.close()


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    """End a connection from outside, whatever it waits for."""
    late.set()
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _refused(message: str) -> RefusedError:
    return RefusedError(400, message, _PARAM)
