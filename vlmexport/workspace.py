"""Where an export is built: a folder beside its destination, renamed when it is finished.

A failure, a full disk or Ctrl-C leaves nothing half written and an older export intact. What a killed process left is
cleared away by the next export to the same place: every such folder is locked by its owner, and the lock goes with it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmexport.errors import BadInputError, NotPossibleHereError, VlmExportError
from vlmexport.manifest import MANIFEST_NAME

_PARTIAL, _OLD, _UNLOCKED = ".partial", ".old", ".new"


def check_destination(out: Path, force: bool, marker: str = MANIFEST_NAME) -> None:
    """Raise `BadInputError` when `out` must not be written: a file, a folder that is not ours to replace, or no name.

    `marker` is the file by which a folder of ours is known. What a killed export to `out` left is cleared away first.
    """
    if out.name in ("", ".."):
        raise BadInputError(
            f"--out {out} has no name of its own to build beside; give a folder that does not exist yet"
        )
    clear_leftovers(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise BadInputError(f"{out} is a file; give a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise BadInputError(f"{out} is not empty and not a vlmexport export; choose another folder with --out")
    if not force:
        raise BadInputError(f"--out {out} already holds an export; use --force to replace it, or choose another folder")


@contextmanager
def calibration_folder(out: Path) -> Iterator[Path]:
    """The folder of finished layers beside `out`: made when first written to, kept when the work is interrupted."""
    folder = out.with_name(f".{out.name}.calibration")
    try:
        yield folder
    except VlmExportError:
        shutil.rmtree(folder, ignore_errors=True)  # the input is at fault: nothing to resume
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def build_beside(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, gone afterwards unless it was moved into place."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _locked_folder(out, _PARTIAL)
    except OSError as error:
        raise NotPossibleHereError(f"cannot write beside {out}: {error.strerror}") from error
    folder.chmod(0o755)
    try:
        yield folder
    except OSError as error:
        raise NotPossibleHereError(f"cannot write the export to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def move_into_place(workspace: Path, destination: Path) -> None:
    """Rename `workspace` to `destination`; an older export there is removed only after the new one stands."""
    if not destination.exists():
        workspace.rename(destination)
        return
    old, lock = _locked_folder(destination, _OLD)
    try:
        destination.rename(old / destination.name)
        try:
            workspace.rename(destination)
        except OSError:
            (old / destination.name).rename(destination)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def clear_leftovers(out: Path) -> None:
    """Remove what killed exports to `out` left beside it; folders of running ones are not touched.

    An older export that was being replaced when the process was killed goes back to its place.
    """
    if not out.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}({re.escape(_PARTIAL)}|{re.escape(_OLD)})")
    for folder in [path for path in out.parent.iterdir() if ours.fullmatch(path.name) and path.is_dir()]:
        lock = _lock(folder)
        if lock is None:
            continue
        before = folder / out.name
        if folder.suffix == _OLD and before.is_dir() and not out.exists():
            before.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(out: Path, suffix: str) -> tuple[Path, int]:
    """A new folder beside `out`, and the descriptor whose end gives it up.

    It gets its name when it is locked, so that nobody finds it unlocked while its owner lives.
    """
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_UNLOCKED, dir=out.parent))
    lock = _lock(made)
    folder = made.with_suffix(suffix)
    made.rename(folder)
    return folder, os.open(folder, os.O_RDONLY) if lock is None else lock


def _lock(folder: Path) -> int | None:
    """Lock `folder` until the descriptor is closed or the process ends; None when it is locked or cannot be."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or this file system has no locks
        os.close(descriptor)
        return None
    return descriptor
