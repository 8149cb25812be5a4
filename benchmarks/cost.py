"""What a program costs beyond its imports: CPU seconds, wall time, and peak memory with file-backed pages apart."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmexport.bench.memory import AnonymousPeak, read_memory

CHILD = Path(__file__).resolve().parent / "child.py"


@dataclass(frozen=True)
class Cost:
    """`cpu_s` counts the whole process, imports included; the ``*_gb`` are peaks over what the imports had taken."""

    cpu_s: float
    wall_s: float
    anon_gb: float
    file_gb: float
    imports_anon_gb: float


def measure(python: Path, preload: list[str], argv: list[str], *, cwd: Path, **program: str) -> Cost:
    """Run ``module=...`` or ``script=...`` with `argv` under `python`; raises RuntimeError with its last words.

    Memory is sampled from outside every 5 ms: anonymous pages are what the program itself needs, file-backed ones the
    kernel can drop.
    """
    spec: dict[str, Any] = {"preload": preload, "argv": argv, "path": [str(cwd)], **program}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [str(python), str(CHILD), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE, text=True, cwd=cwd,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        noise = _until_ready(process)
        base = read_memory(process.pid)
        start = time.perf_counter()
        with AnonymousPeak(process.pid) as peak:
            process.stdin.write("go\n")
            process.stdin.flush()
            noise += process.stderr.read().splitlines()
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(noise[-1] if noise else f"exit code {process.returncode}")
    gb = 1e9
    return Cost(
        usage.ru_utime + usage.ru_stime,
        wall,
        (peak.anon - base.rss_anon) / gb,
        (peak.file - base.rss_file) / gb,
        base.rss_anon / gb,
    )


def _until_ready(process: subprocess.Popen[str]) -> list[str]:
    assert process.stderr is not None
    noise: list[str] = []
    for line in process.stderr:
        if line.strip() == "ready":
            return noise
        noise.append(line)
    return noise
