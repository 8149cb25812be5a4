"""The parent's end of a bench worker: start it, ask it, report how it failed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from vlmexport.bench.worker import Contender
from vlmexport.errors import VlmExportError


class Worker:
    """A running worker process; `load_s` is how long it took to load its model, in seconds."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process = process
        self._errors = errors
        self.load_s = float(self._read()["load_s"])

    def ask(self, command: str) -> dict[str, Any]:
        """Send ``round`` or ``end`` and wait for the reply; raises `VlmExportError` when the worker failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise VlmExportError(f"a bench process ended with code {code}: {last}")
        data: dict[str, Any] = json.loads(line)
        if "error" in data:
            raise _as_raised(data)
        return data


def _as_raised(data: dict[str, Any]) -> VlmExportError:
    error = VlmExportError(data["error"])
    error.exit_code = data["exit_code"]
    return error


def worker_command(contender: Contender) -> list[str]:
    """The command line that measures `contender`."""
    return [sys.executable, "-m", "vlmexport.bench.worker", json.dumps(asdict(contender))]


@contextmanager
def started(command: list[str]) -> Iterator[Worker]:
    """A worker process that speaks the lines of `vlmexport.bench.worker`, ended with the ``with`` block."""
    # A file and not a pipe: nobody reads while the worker runs, and progress bars would fill a pipe.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            yield Worker(process, errors)
        finally:
            process.kill()
