"""How long work tells what it is doing, without knowing who listens.

Stages take a `Progress` and nothing else; the command line passes one that draws bars, notebooks and tests pass
`SilentProgress`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Stage(Protocol):
    """One running stage."""

    def advance(self, n: int = 1, description: str | None = None) -> None:
        """Report `n` finished steps; `description` says what is being worked on now (``layer 3``)."""
        ...


class Progress(Protocol):
    """Somebody who wants to know which stage runs and how far it is."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """Open the stage `name` of `total` steps (None: unknown); it ends with the ``with`` block, well or not."""
        ...


class SilentStage:
    """A stage that nobody watches."""

    def advance(self, n: int = 1, description: str | None = None) -> None:
        """Do nothing."""


class SilentProgress:
    """A `Progress` for nobody: tests, notebooks and ``--quiet``."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """A stage that reports nothing."""
        return nullcontext(SilentStage())
