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

    from vlmexport.plan import ExportPlan, OnnxOptions, WeightGroup, WeightPlan


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
    """The plan, one block per part and fate with alike layers collapsed, and the sizes before and after."""
    for groups in _blocks(plan):
        first = groups[0].weights[0]
        before, after = sum(g.bytes_before for g in groups), sum(g.bytes_after for g in groups)
        title = f"{first.part}: {_fate(first)} ({first.reason}), {_change(before, after)}"
        console.print(title, style="bold", markup=False, soft_wrap=True)
        for group in groups:
            times = f"{len(group.weights)} x " if len(group.weights) > 1 else ""
            shape = "x".join(map(str, group.weights[0].shape))
            console.print(f"  {group.pattern}  {times}[{shape}]", markup=False, soft_wrap=True)
    quantized = [w for w in plan.weights if w.action == "quantize"]
    values, all_values = sum(w.elements for w in quantized), sum(w.elements for w in plan.weights)
    console.print(
        f"{plan.architecture} for {plan.options.target}: {len(quantized)} of {len(plan.weights)} weights quantized, "
        f"{count_text(values)} of {count_text(all_values)} values",
        soft_wrap=True,
    )
    ratio = plan.bytes_after / max(plan.bytes_before, 1)
    console.print(f"weights: {_change(plan.bytes_before, plan.bytes_after)} ({ratio:.0%})")


def _blocks(plan: ExportPlan) -> list[list[WeightGroup]]:
    found: dict[tuple[str, str, str], list[WeightGroup]] = {}
    for group in plan.groups():
        first = group.weights[0]
        found.setdefault((first.part, _fate(first), first.reason), []).append(group)
    return list(found.values())


def _fate(weight: WeightPlan) -> str:
    if weight.scheme is not None:
        return f"{weight.dtype} in groups of {weight.scheme.group_size}"
    return "left out" if weight.action == "drop" else f"kept as {weight.dtype}"


def _change(before: int, after: int) -> str:
    return f"{bytes_text(before)} -> {bytes_text(after)}"
