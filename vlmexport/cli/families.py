"""``vlmexport families``."""

from __future__ import annotations

import dataclasses

import click

from vlmexport import api
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example


@click.command(
    epilog=example("vlmexport families", "vlmexport families qwen2_vl"),
    short_help="Show which model families export to which target.",
)
@click.argument("family", required=False, metavar="[FAMILY]")
@common_options
def command(session: Session, family: str | None) -> None:
    """Show which model families (by their `model_type`) export to which target, and the reason where one does not.

    The table is measured by the tests, on tiny random checkpoints; a checkpoint of a listed family with other settings
    than those may still be refused, with its own reason.
    """
    from rich.table import Table

    from vlmexport.support import STATES, TARGETS

    entries = api.families(family)
    session.write_json({"families": [dataclasses.asdict(entry) for entry in entries]})
    console = session.console()
    table = Table("family", *TARGETS, box=None, pad_edge=False)
    for name in dict.fromkeys(entry.family for entry in entries):
        states = {entry.target: entry.state for entry in entries if entry.family == name}
        table.add_row(name, *(states[target] for target in TARGETS))
    console.print(table)
    for entry in entries:
        if entry.reason:
            console.print(f"{entry.family}, {entry.target}: {entry.reason}", style="dim", markup=False, soft_wrap=True)
    for state in dict.fromkeys(entry.state for entry in entries):
        console.print(f"{state}: {STATES[state]}", style="dim", markup=False, soft_wrap=True)
