"""Folders beside an export: gone when it ends, cleared away after a kill, left alone while their owner runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlmexport.errors import BadInputError
from vlmexport.manifest import MANIFEST_NAME
from vlmexport.workspace import _locked_folder, build_beside, check_destination, clear_leftovers, move_into_place

OWNER = """
import sys, time
from pathlib import Path
from vlmexport.workspace import build_beside
with build_beside(Path(sys.argv[1])) as folder:
    (folder / "decoder.onnx_data").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(600)
"""


@contextmanager
def running_export(out: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that is building an export to `out`, and its folder."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_killed_export_is_cleared_away_by_the_next_one_and_a_running_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_export(out) as (process, folder):
        assert (folder / "decoder.onnx_data").is_file()
        check_destination(out, force=False)
        assert folder.is_dir(), "its owner is alive"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert folder.is_dir()
        check_destination(out, force=False)
    assert names(tmp_path) == set()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    keep = (".out.v2.abcdefgh.partial", ".out.calibration", ".out.abcdefgh.partial.txt", ".other.abcdefgh.partial")
    for name in keep:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    clear_leftovers(tmp_path / "out")
    assert names(tmp_path) == set(keep)
    clear_leftovers(tmp_path / "nowhere" / "out")


def test_an_export_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = tmp_path / ".out.abcdefgh.old"
    (old / "out").mkdir(parents=True)
    (old / "out" / MANIFEST_NAME).write_text("{}")
    check_destination(out, force=True)
    assert (out / MANIFEST_NAME).is_file()
    assert names(tmp_path) == {"out"}


def test_an_older_copy_goes_when_the_new_one_stands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in (out, tmp_path / ".out.abcdefgh.old" / "out"):
        folder.mkdir(parents=True)
        (folder / MANIFEST_NAME).write_text(str(folder))
    check_destination(out, force=True)
    assert (out / MANIFEST_NAME).read_text() == str(out)
    assert names(tmp_path) == {"out"}


def test_this_process_own_folders_are_locked_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with build_beside(out) as folder:
        clear_leftovers(out)
        assert folder.is_dir()
    old, lock = _locked_folder(out, ".old")
    clear_leftovers(out)
    assert old.is_dir()
    os.close(lock)
    clear_leftovers(out)
    assert names(tmp_path) == set()


def test_a_finished_export_replaces_the_older_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        with build_beside(out) as folder:
            (folder / MANIFEST_NAME).write_text(text)
            move_into_place(folder, out)
    assert (out / MANIFEST_NAME).read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_a_failed_move_leaves_the_older_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_text("old")
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "missing", out)
    assert (out / MANIFEST_NAME).read_text() == "old"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("out", [".", "..", "/", "sub/.."])
def test_a_folder_without_a_name_of_its_own_is_refused(out: str) -> None:
    with pytest.raises(BadInputError, match=r"--out .* has no name of its own"):
        check_destination(Path(out), True)
