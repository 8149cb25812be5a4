"""What all commands share: the common options, where output goes, and progress bars."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from socketserver import BaseServer

    from rich.console import Console

    from vlmexport.progress import Progress


@dataclass
class Session:
    """The common options of one call.

    Results for people go to stdout, or to stderr when ``--json -`` takes stdout; progress always goes to stderr.
    """

    verbose: bool = False
    quiet: bool = False
    json_path: str | None = None

    def console(self) -> Console:
        """Where tables and text for people go; silent with ``--quiet``."""
        from rich.console import Console

        return Console(stderr=self.json_path == "-", quiet=self.quiet, highlight=False, soft_wrap=False)

    def progress(self) -> AbstractContextManager[Progress]:
        """A `Progress` for the length of one command: bars on stderr, or silence with ``--quiet``."""
        from vlmexport.cli.bars import rich_progress
        from vlmexport.progress import SilentProgress

        return nullcontext(SilentProgress()) if self.quiet else rich_progress()

    def write_json(self, data: dict[str, Any]) -> None:
        """Write the machine-readable result where ``--json`` says; nothing without it."""
        if self.json_path is None:
            return
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        if self.json_path == "-":
            sys.stdout.write(text)
        else:
            write_atomically(Path(self.json_path), text)


def serve_until_interrupted(server: BaseServer) -> None:
    """Answer until Ctrl-C, then let the port go."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    finally:
        server.server_close()


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of it."""
    if not path.parent.is_dir():
        raise BadInputError(f"{path}: the folder {path.parent} does not exist")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def common_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--verbose``, ``--quiet`` and ``--json`` to a command, which gets the `Session` as its first argument."""

    @click.option("--verbose", "-v", is_flag=True, show_default="off", help="Show library messages and tracebacks.")
    @click.option("--quiet", "-q", is_flag=True, show_default="off", help="Print only errors, and `run`'s answer.")
    @click.option(
        "--json", "json_path", metavar="FILE", default=None, show_default="none",
        help="Write the machine-readable result to FILE; `-` is stdout.",
    )  # fmt: skip
    @functools.wraps(function)
    def command(*, verbose: bool, quiet: bool, json_path: str | None, **values: Any) -> None:
        session = click.get_current_context().ensure_object(Session)
        if verbose and quiet:
            raise click.UsageError("--verbose and --quiet exclude each other")
        session.verbose, session.quiet, session.json_path = verbose, quiet, json_path
        with _library_noise(verbose):
            function(session, **values)

    return command


@contextmanager
def _library_noise(verbose: bool) -> Iterator[None]:
    if verbose:
        yield
        return
    # transformers and huggingface_hub read these when they are imported, which is later, inside the command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
