"""The report on a terminal: the verdict, what failed first, the two questions side by side, then the checks."""

from __future__ import annotations

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmexport.verify.report.words import compact, group_checks, part_label, percent, ratio, reference_name
from vlmexport.verify.result import Check, ParityReport

_COLORS = {"passed": "green", "failed": "bold red", "not_run": "yellow", "incomplete": "yellow"}


def print_report(report: ParityReport, console: Console, *, every_check: bool = False) -> None:
    """Print `report`; checks of the same kind are one row (their worst) unless `every_check`."""
    failures = report.failures()
    if failures:
        first = failures[0]
        console.print(f"[bold red]{part_label(first.part)} failed:[/] {escape(_sentence(first))}")
        for check in failures[1:4]:
            console.print(f"  [red]also[/] {escape(_sentence(check))}")
        if len(failures) > 4:
            console.print(f"  [red]and {len(failures) - 4} more, in the table below[/]")
    for check in report.not_run()[:4]:
        console.print(f"[yellow]not run: {escape(check.name)}[/] ({escape(check.reason)})")
    console.print(Columns([_lowering(report), _quantization(report)], padding=(0, 4)))
    console.print(_checks(report, every_check=every_check))
    if report.tasks:
        console.print(_tasks(report))
    status = report.status
    seconds = report.runtime.get("seconds")
    took = "" if seconds is None else f" in {seconds:.0f} s"
    console.print(f"[{_COLORS[status]}]verify: {status}[/] ({len(report.checks)} checks{took})")


def _sentence(check: Check) -> str:
    value = "" if check.value is None or check.limit is None else f"{_measured(check)} (limit {compact(check.limit)})"
    return ", ".join(part for part in (f"{check.name}: {value}" if value else check.name, check.reason) if part)


def _measured(check: Check) -> str:
    return f"{check.metric.removesuffix(' <=').removesuffix(' >=')} {compact(check.value)}"


def _lowering(report: ParityReport) -> Table:
    numbers = report.lowering
    rows = [
        ("max |logit difference|, exact", compact(numbers.max_abs_logit)),
        ("KL as shipped, nats/token", compact(numbers.kl)),
        ("same top token as shipped", percent(numbers.top1)),
    ]
    return _question_table("Lowering error", report.status_of("lowering"), rows)


def _quantization(report: ParityReport) -> Table:
    numbers = report.quantization
    rows = [
        (f"KL from {reference_name(report)}, nats/token", compact(numbers.kl)),
        ("same top token", percent(numbers.top1)),
        ("answer perplexity ratio", ratio(numbers.perplexity_ratio)),
    ]
    if numbers.accuracy is not None:
        against = reference_name(report).removeprefix("the ")
        rows.append((f"accuracy ({against})", f"{percent(numbers.accuracy)} ({percent(numbers.reference_accuracy)})"))
    return _question_table("Quantization loss", report.status_of("quantization"), rows)


def _question_table(title: str, status: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=f"{title}: [{_COLORS[status]}]{status}[/]", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _checks(report: ParityReport, *, every_check: bool) -> Table:
    # Names are what a user greps for: they are never cut, also on a terminal of 80 columns.
    table = Table(title="Checks", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("metric")
    for group in group_checks(report.checks, every_check=every_check):
        check = group.worst
        status = f"[{_COLORS[check.status]}]{check.status.replace('_', ' ')}[/]"
        sign = "<=" if check.metric.endswith("<=") else ">="
        limit = "" if check.limit is None else f"{sign} {compact(check.limit)}"
        name = group.name if check.name.startswith(f"{check.part}/") else f"{check.part}: {group.name}"
        name = name if group.count == 1 else f"{name} ({group.count})"
        metric = check.metric.removesuffix(" <=").removesuffix(" >=")
        table.add_row(escape(name), status, compact(check.value), limit, metric)
    return table


def _tasks(report: ParityReport) -> Table:
    table = Table("task", title="Accuracy on the questions", title_justify="left")
    for column in ("questions", "exported", "original"):
        table.add_column(column, justify="right")
    for task in report.tasks:
        numbers = (percent(task.accuracy), percent(task.reference_accuracy))
        table.add_row(escape(task.task), str(task.questions), *numbers)
    return table
