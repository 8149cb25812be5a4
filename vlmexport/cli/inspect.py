"""``vlmexport inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.options import model_argument, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, count_text, example

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.inspection import InspectReport


@click.command(
    epilog=example("vlmexport inspect demo", "vlmexport inspect ./my-finetune --json -"),
    short_help="Show a model's parts, sizes, KV cache, targets and recipe.",
)
@model_argument
@trust_option
@common_options
def command(session: Session, model: str, trust_remote_code: bool) -> None:
    """Show a model's parts, sizes, merge strategy, KV cache, targets and a suggested recipe.

    MODEL is a folder, a hub id, or `demo` for the bundled model.
    """
    report = api.inspect_model(model, trust_remote_code=trust_remote_code)
    session.write_json(report.to_dict())
    print_report(report, session.console())


def print_report(report: InspectReport, console: Console) -> None:
    """The report as tables."""
    from rich.table import Table

    console.print(f"[bold]{report.model}[/]  {report.architecture} ({report.model_type}), weights in {report.dtype}")
    table = Table("part", "modules")
    for header in ("parameters", "share", "FP16", "INT4 g32"):
        table.add_column(header, justify="right")
    for part in report.parts:
        sizes = (bytes_text(part.fp16_bytes), bytes_text(part.int4_bytes))
        table.add_row(part.role, ", ".join(part.modules), count_text(part.parameters), f"{part.share:.1%}", *sizes)
    total = (bytes_text(sum(p.fp16_bytes for p in report.parts)), bytes_text(sum(p.int4_bytes for p in report.parts)))
    table.add_row("total", "", count_text(report.parameters), "", *total, style="bold")
    console.print(table)
    if report.tied_embeddings:
        console.print("The LM head is tied to the embedding: counted once here, exported as a copy of its own.")
    console.print(f"merge: {report.merge}; positions: {report.positions}; image token id {report.image_token_id}")
    for size, tokens in report.tokens_per_image.items():
        console.print(f"  an image of {size} becomes {tokens} tokens")
    if report.tokens_per_image_note:
        console.print(f"  {report.tokens_per_image_note}")
    _print_cache(report, console)
    for target in report.targets:
        state = "[green]yes[/]" if target.can_export else "[red]no[/]"
        console.print(f"target {target.name}: {state}  {target.reason}")
    console.print(f"suggested: [bold]{report.recipe.command}[/]\n  {report.recipe.reason}")


def _print_cache(report: InspectReport, console: Console) -> None:
    kv = report.kv
    lengths = ", ".join(f"{bytes_text(size)} at {int(n) // 1024}K" for n, size in kv.bytes_at.items())
    console.print(
        f"KV cache (FP16): {kv.layers} layers x {kv.heads} heads x {kv.head_dim}: "
        f"{bytes_text(kv.bytes_per_token)} per token, {lengths}"
    )
