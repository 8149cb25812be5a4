"""``vlmexport inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.options import lora_option, model_argument, trust_option
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
@lora_option
@trust_option
@common_options
def command(session: Session, model: str, lora: str | None, trust_remote_code: bool) -> None:
    """Show a model's parts, sizes, merge strategy, KV cache, targets and a suggested recipe.

    MODEL is a folder, a hub id, or `demo` for the bundled model.
    """
    report = api.inspect_model(model, lora=lora, trust_remote_code=trust_remote_code)
    session.write_json(report.to_dict())
    print_report(report, session.console())


def print_report(report: InspectReport, console: Console) -> None:
    """The report: a table of the parts, then one line per fact."""
    console.print(
        f"{report.model}: {report.architecture} ({report.model_type}), weights in {report.dtype}",
        style="bold", markup=False, soft_wrap=True,
    )  # fmt: skip
    _print_parts(report, console)
    for line in _facts(report):
        console.print(line, markup=False, soft_wrap=True)


def _print_parts(report: InspectReport, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table("part", box=box.SIMPLE)
    for header in ("parameters", "share", "FP16", "INT4 g32"):
        table.add_column(header, justify="right")
    for part in report.parts:
        sizes = (bytes_text(part.fp16_bytes), bytes_text(part.int4_bytes))
        table.add_row(part.role, count_text(part.parameters), f"{part.share:.1%}", *sizes)
    total = (bytes_text(sum(p.fp16_bytes for p in report.parts)), bytes_text(sum(p.int4_bytes for p in report.parts)))
    table.add_row("total", count_text(report.parameters), "", *total, style="bold")
    console.print(table)


def _facts(report: InspectReport) -> Iterator[str]:
    for part in report.parts:
        yield f"{part.role}: {', '.join(part.modules)}"
    if report.quantized is not None:
        yield f"already quantized: {report.quantized}; an export keeps these codes"
    yield from (f"  {note}" for note in report.quantized_notes)
    if report.lora is not None:
        yield f"with the adapter merged: {report.lora}"
    yield from (f"  {note}" for note in report.lora_notes)
    if report.tied_embeddings:
        yield "the LM head is tied to the embedding: counted once here, a copy of its own in an export"
    if report.merge is not None:
        yield f"images: {report.merge} at token {report.image_token_id}, positions {report.positions}"
    yield from (f"  {note}" for note in report.split_notes)
    for size, tokens in report.tokens_per_image.items():
        yield f"  a picture of {size} becomes {tokens} tokens"
    yield f"  {report.tokens_per_image_note}"
    kv = report.kv
    lengths = ", ".join(f"{bytes_text(size)} at {int(n) // 1024}K" for n, size in kv.bytes_at.items())
    layers = f"{kv.layers} layers" if kv.keeping_layers == kv.layers else f"{kv.keeping_layers} of {kv.layers} layers"
    geometry = f"{layers} x {kv.heads} heads x {kv.head_dim}"
    yield f"KV cache (FP16): {geometry}: {bytes_text(kv.bytes_per_token)} per token, {lengths}"
    if kv.uniform:
        lengths = ", ".join(f"{bytes_text(size)} at {int(n) // 1024}K" for n, size in kv.int8_bytes_at.items())
        yield f"KV cache (--kv-cache int8): {bytes_text(kv.int8_bytes_per_token)} per token, {lengths}"
    if kv.state_bytes:
        yield f"states (FP16): {bytes_text(kv.state_bytes)} for each sequence, however long it is"
    for target in report.targets:
        yield f"target {target.name}: {'yes' if target.can_export else 'no'}: {target.reason}"
    yield f"suggested: {report.recipe.command}"
    yield f"  {report.recipe.reason}"
    yield from (f"  {line}" for line in report.recipe.advice)
