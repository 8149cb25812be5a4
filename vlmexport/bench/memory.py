"""Memory of a process, as the kernel counts it: anonymous and file-backed pages apart."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_FIELDS = {"VmHWM": "peak_rss", "RssAnon": "rss_anon", "RssFile": "rss_file"}


@dataclass(frozen=True)
class Memory:
    """Bytes: the largest resident set so far, and what is resident now as anonymous and as file-backed pages.

    The last two are 0 where the kernel does not tell (anything but Linux).
    """

    peak_rss: int
    rss_anon: int
    rss_file: int


def read_memory(pid: int | None = None) -> Memory:
    """Memory of process `pid` (default: this one)."""
    status = Path("/proc") / ("self" if pid is None else str(pid)) / "status"
    if not status.is_file():
        return Memory(_peak_without_proc(), 0, 0)
    found = dict.fromkeys(_FIELDS.values(), 0)
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] = 1024 * int(value.split()[0])
    return Memory(**found)


def _peak_without_proc() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory(facts: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a process may take before the machine swaps, as the kernel's `facts` estimate them.

    None where the kernel does not tell (anything but Linux). The limit of a container is not in it.
    """
    if not facts.is_file():
        return None
    for line in facts.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(value.split()[0])
    return None


class AnonymousPeak:
    """Samples a process's memory while a ``with`` block runs; the kernel keeps no peak of RssAnon itself.

    `pid`: the process (None: this one). After the block `anon` and `file` are the largest values seen, in bytes.
    """

    def __init__(self, pid: int | None = None, interval: float = 0.005) -> None:
        self.anon = 0
        self.file = 0
        self._pid = pid
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_done, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _sample_until_done(self) -> None:
        while True:
            now = read_memory(self._pid)
            self.anon, self.file = max(self.anon, now.rss_anon), max(self.file, now.rss_file)
            if self._done.wait(self._interval):
                return


def folder_bytes(folder: Path, keep: Callable[[Path], bool] = lambda file: True) -> int:
    """Total size of the files below `folder` that `keep` accepts."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and keep(f))
