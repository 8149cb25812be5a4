from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vlmexport.bench.memory import AnonymousPeak, available_memory, folder_bytes, read_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells only on Linux")


@linux
def test_anonymous_peak_sees_memory_that_is_gone() -> None:
    before = read_memory().rss_anon
    with AnonymousPeak(interval=0.001) as peak:
        block = np.ones(40_000_000, np.uint8)
        block += 1
        del block
    assert peak.anon >= before + 30_000_000


@linux
def test_file_pages_are_apart(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 40_000_000)
    before = read_memory()
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum(dtype=np.int64) == 40_000_000 * ord("x")
    after = read_memory()
    assert after.rss_file >= before.rss_file + 30_000_000
    assert after.rss_anon < before.rss_anon + 30_000_000


def test_what_is_available_is_read_where_the_kernel_tells(tmp_path: Path) -> None:
    facts = tmp_path / "meminfo"
    assert available_memory(facts) is None
    facts.write_text("MemTotal:       32000000 kB\nMemFree:          100000 kB\nMemAvailable:    2000000 kB\n")
    assert available_memory(facts) == 2_048_000_000
    facts.write_text("MemTotal:       32000000 kB\n")
    assert available_memory(facts) is None


@linux
def test_some_memory_is_available_here() -> None:
    assert (available_memory() or 0) > 10_000_000


def test_peak_is_known_everywhere() -> None:
    assert read_memory().peak_rss > 10_000_000


def test_folder_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.safetensors").write_bytes(b"123")
    (tmp_path / "y.json").write_bytes(b"12")
    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path, lambda f: f.suffix == ".json") == 2
