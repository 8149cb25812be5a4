"""``vlmexport plan``: what an export would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.gguf import fallback_lines, gguf_choices
from vlmexport.cli.options import FOLDER, calibration_options, lora_option, model_option, onnx_options, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, count_text, example
from vlmexport.cli.trt import trt_choices
from vlmexport.plan import layer_pattern
from vlmexport.quantize.scheme import PER_CHANNEL

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.gguf_options import GgufOptions, GgufPlan
    from vlmexport.plan import ExportPlan, OnnxOptions, WeightGroup, WeightPlan
    from vlmexport.trt_options import TrtOptions


@click.group(epilog=example("vlmexport plan onnx --model demo"))
def command() -> None:
    """Show what an export would do to every weight; nothing is written."""


@command.command(
    "onnx",
    epilog=example(
        "vlmexport plan onnx --model demo", "vlmexport plan onnx --model demo --quant auto --max-size 5.3MB"
    ),
)
@model_option
@lora_option
@onnx_options
@calibration_options
@click.option(
    "--save-plan", type=FOLDER, default=None, show_default="none", metavar="FILE",
    help="Where --quant auto writes its choice, for --plan of other commands.",
)  # fmt: skip
@trust_option
@common_options
def plan_onnx(
    session: Session,
    model: str,
    lora: str | None,
    options: OnnxOptions,
    calibration: CalibrationOptions,
    save_plan: Path | None,
    trust_remote_code: bool,
) -> None:
    """Show what `vlmexport onnx` with the same options would do to every weight of MODEL.

    The table shows alike weights of repeated layers as one row; --json lists every weight. Only --quant auto looks at
    calibration samples here.
    """
    if save_plan is not None and options.choice is None:
        raise click.UsageError("--save-plan needs --quant auto")
    with session.progress() as progress:
        plan = api.plan_onnx(
            model,
            options,
            calibration=calibration,
            save_plan=save_plan,
            progress=progress,
            lora=lora,
            trust_remote_code=trust_remote_code,
        )
    session.write_json(plan.to_dict())
    print_plan(plan, session.console())


@command.command("gguf", epilog=example("vlmexport plan gguf --model demo --quant Q5_K_M"))
@model_option
@lora_option
@gguf_choices
@trust_option
@common_options
def plan_gguf(session: Session, model: str, lora: str | None, options: GgufOptions, trust_remote_code: bool) -> None:
    """Show what `vlmexport gguf` with the same options would make of every weight of MODEL.

    The table shows alike tensors of repeated blocks as one row; --json lists every tensor.
    """
    with session.progress() as progress:
        plan = api.plan_gguf(model, options, progress=progress, lora=lora, trust_remote_code=trust_remote_code)
    session.write_json(plan.to_dict())
    print_gguf_plan(plan, session.console())


@command.command("trt", epilog=example("vlmexport plan trt --model demo --gpu rtx-4090 --max-batch 8"))
@model_option
@lora_option
@trt_choices
@trust_option
@common_options
def plan_trt(session: Session, model: str, lora: str | None, options: TrtOptions, trust_remote_code: bool) -> None:
    """Show what `vlmexport trt` with the same options would do, whether it fits the GPU, and the floors of its time."""
    with session.progress() as progress:
        plan = api.plan_trt(model, options, progress=progress, lora=lora, trust_remote_code=trust_remote_code)
    session.write_json(plan.to_dict())
    console = session.console()
    print_plan(plan.export, console)
    for line in plan.prediction.lines():
        console.print(line, markup=False, soft_wrap=True)
    builder = {"rtx": "TensorRT for RTX, here", "trt": "TensorRT proper, here"}
    engines = builder[plan.engines.builder] if plan.engines.builder else f"not here: {plan.engines.reason}"
    console.print(f"engines: {engines}", markup=False, soft_wrap=True)
    for line in plan.notes:
        console.print(f"note: {line}", style="dim", markup=False, soft_wrap=True)


def print_gguf_plan(plan: GgufPlan, console: Console) -> None:
    """Both files, one block per type and reason with alike blocks collapsed, then sizes and fall-backs."""
    for file in ("text", "mmproj"):
        blocks: dict[tuple[str, str], dict[tuple[str, tuple[int, ...]], int]] = {}
        for tensor in plan.of(file):
            alike = blocks.setdefault((tensor.type, tensor.reason), {})
            key = (layer_pattern(tensor.name), tensor.shape)
            alike[key] = alike.get(key, 0) + 1
        for (kind, reason), alike in blocks.items():
            console.print(f"{file}: {kind} ({reason})", style="bold", markup=False, soft_wrap=True)
            for (name, shape), count in alike.items():
                times = f"{count} x " if count > 1 else ""
                console.print(f"  {name}  {times}[{'x'.join(map(str, shape))}]", markup=False, soft_wrap=True)
    for file, arch in (("text", plan.arch), ("mmproj", plan.projector)):
        size = bytes_text(sum(t.bytes for t in plan.of("text" if file == "text" else "mmproj")))
        bits = plan.bits_per_weight("text" if file == "text" else "mmproj")
        console.print(f"{file} ({arch}): {size}, {bits:.2f} bits per weight", soft_wrap=True)
    for line in fallback_lines(plan):
        console.print(f"note: {line}", style="dim", markup=False, soft_wrap=True)
    for name, reason in plan.unused.items():
        console.print(f"not stored: {name} ({reason})", style="dim", markup=False, soft_wrap=True)


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
    cache = "int8" if plan.options.kv_cache == "int8" else plan.decoder_dtype
    console.print(f"KV cache: {cache}, {bytes_text(plan.kv_bytes_per_token)} per token of one sequence")
    if plan.state_bytes:
        console.print(f"states: {bytes_text(plan.state_bytes)} for each sequence, however long it is")
    if plan.prefill_bytes:
        size = bytes_text(plan.prefill_bytes)
        console.print(f"prompts: INT8 copies of the decoder's linears, {size} more in the export and in memory")
    ratio = plan.bytes_after / max(plan.bytes_before, 1)
    console.print(f"weights: {_change(plan.bytes_before, plan.bytes_after)} ({ratio:.0%})")
    for line in plan.advice:
        console.print(f"note: {line}", style="dim", markup=False, soft_wrap=True)


def _blocks(plan: ExportPlan) -> list[list[WeightGroup]]:
    found: dict[tuple[str, str, str], list[WeightGroup]] = {}
    for group in plan.groups():
        first = group.weights[0]
        found.setdefault((first.part, _fate(first), first.reason), []).append(group)
    return list(found.values())


def _fate(weight: WeightPlan) -> str:
    if weight.scheme is not None:
        size = weight.scheme.group_size
        return f"{weight.dtype}, one scale per row" if size == PER_CHANNEL else f"{weight.dtype} in groups of {size}"
    return "left out" if weight.action == "drop" else f"kept as {weight.dtype}"


def _change(before: int, after: int) -> str:
    return f"{bytes_text(before)} -> {bytes_text(after)}"
