"""``vlmexport bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.cli.options import artifact_argument, reference_lora_option, reference_option, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, example

if TYPE_CHECKING:
    from rich.console import Console


@click.command(
    epilog=example("vlmexport bench demo-int4", "vlmexport bench demo-int4 --json bench.json --html bench.html"),
    short_help="Measure an export, and PyTorch beside it.",
)
@artifact_argument
@reference_option
@reference_lora_option
@click.option(
    "--record/--no-record", default=False, show_default=True, help="Keep the numbers in the export's manifest."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE", show_default="none",
    help="Write a page with the bars.",
)  # fmt: skip
@trust_option
@common_options
def command(
    session: Session,
    artifact: Path,
    model: str | None,
    lora: str | None,
    record: bool,
    html: Path | None,
    trust_remote_code: bool,
) -> None:
    """Measure the export in DIR, and PyTorch with the original model in the same run."""
    with session.progress() as progress:
        report = api.bench_artifact(
            artifact, model=model, lora=lora, record=record, progress=progress, trust_remote_code=trust_remote_code
        )
    data = report.to_dict()
    session.write_json(data)
    if html is not None:
        from vlmexport.verify.report.html import write_bench
        from vlmexport.verify.report.sections import read_beside

        write_bench(data, html, read_beside(artifact, None, None))
    print_bench(data, session.console())


def print_bench(data: dict[str, Any], console: Console) -> None:
    """The measurement as a table: one column per runner, one row per number, the ratios beside them."""
    from rich.table import Table

    columns = {"artifact": data["artifact"], **data["references"]}
    table = Table("")
    for name in columns:
        table.add_column(name, justify="right")
    for key in data["artifact"]:
        table.add_row(key, *(_cell(key, values.get(key)) for values in columns.values()))
    console.print(table)
    console.print(f"artifact: {data['runtime']}")
    for name, ratio in data["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x" if isinstance(ratio, int | float) else f"{name}: {ratio}")


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return bytes_text(value) if key.endswith("_bytes") else f"{value:.4g}"
