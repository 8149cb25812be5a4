"""Whose turn it is: one answer at a time, in the order of arrival, and bounds on what waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError


class Turns:
    """First come, first served; raises `RefusedError` (503) for what does not fit any more."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._bytes = 0

    @property
    def waiting(self) -> int:
        """Requests that wait or run."""
        return len(self._queue)

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Hold bytes of the budget for bodies and fetched pictures: what is yielded takes more of it as they arrive."""
        held = 0

        def take(size: int) -> None:
            nonlocal held
            with self._changed:
                if self._bytes + size > self._limits.waiting_bytes:
                    raise RefusedError(
                        503, "the server holds as many requests as it has memory for; try again", retry_s=5
                    )
                self._bytes += size
                held += size

        try:
            yield take
        finally:
            with self._changed:
                self._bytes -= held

    def _wait(self, me: object, end: float) -> None:
        while self._queue[0] is not me:
            if not self._changed.wait(max(end - time.monotonic(), 0)):
                raise RefusedError(503, f"no turn within {self._limits.wait_s:g} s; try again", retry_s=30)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn; at most `Limits.waiting` wait."""
        me, end = object(), time.monotonic() + self._limits.wait_s
        with self._changed:
            if len(self._queue) > self._limits.waiting:
                raise RefusedError(503, f"{self._limits.waiting} requests are waiting already; try again", retry_s=5)
            self._queue.append(me)
            try:
                self._wait(me, end)
            except BaseException:
                self._queue.remove(me)
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._queue.remove(me)
                self._changed.notify_all()
