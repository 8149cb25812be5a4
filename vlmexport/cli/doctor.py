"""``vlmexport doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.doctor import DoctorReport


@click.command(
    epilog=example("vlmexport doctor", "vlmexport doctor --json -"),
    short_help="Show what works on this machine, and the fix for the rest.",
)
@common_options
def command(session: Session) -> None:
    """Show which targets, runtimes and accelerators work here, and the fix for those that do not."""
    report = api.examine_machine()
    session.write_json(report.to_dict())
    print_doctor(report, session.console())


def print_doctor(report: DoctorReport, console: Console) -> None:
    """One line per finding, with its fix below it."""
    from rich.markup import escape

    kind = ""
    for finding in report.findings:
        if finding.kind != kind:
            kind = finding.kind
            console.print(f"[bold]{kind}[/]")
        mark = "[green]ok[/]  " if finding.works else "[yellow]no[/]  "
        console.print(f"  {mark}{finding.name}: {escape(finding.detail)}", soft_wrap=True)
        if finding.fix:
            console.print(f"        fix: [bold]{escape(finding.fix)}[/]", soft_wrap=True)
