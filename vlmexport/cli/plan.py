"""``vlmexport plan``: what an export would do, without doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.options import model_option, onnx_options, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, count_text, example

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.plan import ExportPlan, OnnxOptions


@click.group(epilog=example("vlmexport plan onnx --model demo"))
def command() -> None:
    """Show what an export would do to every weight; nothing is written."""


@command.command(
    "onnx",
    epilog=example("vlmexport plan onnx --model demo", "vlmexport plan onnx --model demo --bits 8 --json plan.json"),
)
@model_option
@onnx_options
@trust_option
@common_options
def plan_onnx(session: Session, model: str, options: OnnxOptions, trust_remote_code: bool) -> None:
    """Show what `vlmexport onnx` with the same options would do to every weight of MODEL.

    The table shows alike weights of repeated layers as one row; --json lists every weight.
    """
    plan = api.plan_onnx(model, options, trust_remote_code=trust_remote_code)
    session.write_json(plan.to_dict())
    print_plan(plan, session.console())


def print_plan(plan: ExportPlan, console: Console) -> None:
    """The plan as a table with alike rows collapsed, and the sizes before and after."""
    from rich.table import Table

    table = Table("part", "weight", "shape", "what", "why")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for group in plan.groups():
        first = group.weights[0]
        times = f" x{len(group.weights)}" if len(group.weights) > 1 else ""
        table.add_row(
            first.part,
            f"{group.pattern}{times}",
            "x".join(map(str, first.shape)),
            f"[green]{first.dtype} g{first.scheme.group_size}[/]" if first.scheme else f"keep {first.dtype}",
            first.reason,
            bytes_text(group.bytes_before),
            bytes_text(group.bytes_after),
        )
    console.print(table)
    quantized = [w for w in plan.weights if w.action == "quantize"]
    values, all_values = sum(w.elements for w in quantized), sum(w.elements for w in plan.weights)
    console.print(
        f"{plan.architecture} for {plan.options.target}: {len(quantized)} of {len(plan.weights)} weights quantized "
        f"({count_text(values)} of {count_text(all_values)} values)"
    )
    before, after = plan.bytes_before, plan.bytes_after
    console.print(f"weights: {bytes_text(before)} before, {bytes_text(after)} after ({after / max(before, 1):.0%})")
