"""``vlmexport demo``: the whole way, once, on the bundled model."""

from __future__ import annotations

from pathlib import Path

import click

from vlmexport.cli.options import FOLDER
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example

DEFAULT_OUT = Path("vlmexport-demo")


@click.command(
    epilog=example("vlmexport demo", "vlmexport demo --out /tmp/demo"),
    short_help="The whole way on the bundled model: export, proof, bench, questions.",
)
@click.option(
    "--out", type=FOLDER, default=DEFAULT_OUT, show_default=True, metavar="DIR",
    help="Folder for the export; an earlier demo there is replaced.",
)  # fmt: skip
@click.option("--bench/--no-bench", default=True, show_default=True, help="Measure the export against PyTorch.")
@common_options
def command(session: Session, out: Path, bench: bool) -> None:
    """Export the bundled model, prove it, measure it, and ask it about a picture."""
    from vlmexport.cli.tour import take_tour

    session.write_json(take_tour(session, out, bench=bench))
