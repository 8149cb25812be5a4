"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vlmexport.progress import Progress, Stage


class _BarStage:
    """One bar."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, n: int = 1, description: str | None = None) -> None:
        self._bars.update(self._task, advance=n, detail=description or "")


class _BarProgress:
    """A bar per stage; finished stages stay on the screen with their time."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        return self._stage(name, total)

    @contextmanager
    def _stage(self, name: str, total: int | None) -> Iterator[Stage]:
        task = self._bars.add_task(name, total=total, detail="")
        yield _BarStage(self._bars, task)
        steps = self._bars.tasks[self._bars.task_ids.index(task)].completed if total is None else total
        self._bars.update(task, total=max(steps, 1), completed=max(steps, 1), detail="")


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """Draw bars while the block runs; plain lines per stage where stderr is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LineProgress(console)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Bars(*columns, console=console) as bars:
        yield _BarProgress(bars)


class _LineStage:
    """A stage in a log file: its steps would only be noise."""

    def advance(self, n: int = 1, description: str | None = None) -> None:
        pass


class _LineProgress:
    """One line when a stage starts, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def _stage(self, name: str, total: int | None) -> Iterator[Stage]:
        self._console.print(name if total is None else f"{name} ({total})", markup=False, highlight=False)
        yield _LineStage()

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        return self._stage(name, total)
