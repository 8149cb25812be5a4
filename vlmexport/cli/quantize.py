"""``vlmexport quantize``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.checkpoint_plan import FORMATS, CheckpointOptions
from vlmexport.cli.onnx import raise_if_failed
from vlmexport.cli.options import (
    CHOICE_OPTIONS,
    FOLDER,
    KEEP_OPTION,
    SCHEME_OPTIONS,
    Command,
    QuantChoice,
    bit_choice,
    calibration_options,
    decorate,
    given,
    lora_option,
    model_option,
    trust_option,
)
from vlmexport.cli.push import push_options
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, example
from vlmexport.quantize.registry import CHOICES
from vlmexport.quantize.scheme import DEFAULT_ALGORITHM, make_scheme

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.quantize_pipeline import CheckpointResult
    from vlmexport.verify.result import ParityReport

_DEFAULTS = ", ".join(f"{f.default_quant} for {f.name}" for f in FORMATS.values())
_COLORS = {"passed": "green", "failed": "bold red", "not_run": "yellow", "incomplete": "yellow"}
_OPTIONS = (
    click.option(
        "--format", "format_name", type=click.Choice(list(FORMATS)), default="compressed-tensors", show_default=True,
        help="Format of the checkpoint.",
    ),
    click.option(
        "--quant", type=QuantChoice(["auto", *CHOICES]), default=None, show_default=_DEFAULTS,
        help="How decoder weights are quantized; each format takes those whose codes it can hold. `auto` chooses 4, 8 "
        "or 16 bits for each (awq+gptq, compressed-tensors) so that --max-kl or --max-size is met.",
    ),
    *CHOICE_OPTIONS,
    *SCHEME_OPTIONS,
    KEEP_OPTION,
)  # fmt: skip


def checkpoint_options(function: Command) -> Command:
    """Add the choices of a checkpoint to a command, which gets them as one `CheckpointOptions` named ``options``."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        name = values.pop("format_name")
        named = given("quant", "bits", "group_size", "symmetric", "clip")
        choice, quant = bit_choice(values), values.pop("quant")
        algorithm = DEFAULT_ALGORITHM if quant == "auto" else quant or FORMATS[name].default_quant
        shape = [values.pop(key) for key in ("bits", "group_size", "symmetric", "clip")]
        options = CheckpointOptions(name, make_scheme(algorithm, *shape), values.pop("keep"), bool(named), choice)
        return function(*args, options=options, **values)

    return decorate(command, _OPTIONS)


@click.command(
    epilog=example(
        "vlmexport quantize --model demo --out demo-w4a16",
        "vlmexport quantize --model ./my-finetune --out my-awq --format awq --quant awq --asymmetric",
        "vlmexport quantize --model ./my-gptq --out my-w4a16 --format compressed-tensors",
    ),
    short_help="Write a quantized Hugging Face checkpoint for transformers and vLLM.",
)
@model_option
@lora_option
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Folder to write.")
@checkpoint_options
@calibration_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read the checkpoint back and load it.")
@click.option("--force", is_flag=True, show_default="off", help="Replace DIR if it exists.")
@trust_option
@common_options
@push_options
def command(
    session: Session,
    model: str,
    lora: str | None,
    out: Path,
    options: CheckpointOptions,
    calibration: CalibrationOptions,
    verify: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Write MODEL as a Hugging Face checkpoint with a quantized decoder, for transformers and vLLM.

    The vision side, projector, embedding and LM head are copied unchanged and listed as not quantized. A MODEL that is
    quantized already is converted: it keeps its codes, nothing is rounded again. An interrupted run goes on where it
    stopped when the same command is given again. DIR appears only when everything went well; a checkpoint whose checks
    fail is kept as DIR.failed, and the exit code is 3.
    """
    with session.progress() as progress:
        result = api.quantize_checkpoint(
            model,
            out,
            options,
            calibration=calibration,
            verify=verify,
            force=force,
            progress=progress,
            lora=lora,
            trust_remote_code=trust_remote_code,
        )
    session.write_json(result_data(result))
    console = session.console()
    print_result(result, console)
    for line in () if result.quant_plan is None else result.quant_plan.lines():
        console.print(line, markup=False, soft_wrap=True)
    if result.report is not None:
        print_checks(result.report, console)
        raise_if_failed(result.report)


def result_data(result: CheckpointResult) -> dict[str, Any]:
    """The ``--json`` keys of a checkpoint."""
    manifest = result.manifest
    return {
        "path": str(result.path),
        "format": manifest.checkpoint_format,
        "size_bytes": sum(f.bytes for f in manifest.files.values()),
        "files": {name: f.bytes for name, f in manifest.files.items()},
        "quantized": len(manifest.quantized),
        "unquantized": len(manifest.unquantized),
        "report": None if result.report is None else result.report.to_dict(),
    }


def print_result(result: CheckpointResult, console: Console) -> None:
    """Where the checkpoint is, what is in it, and what its source or the calibration has to say."""
    from rich.markup import escape

    manifest = result.manifest
    before = manifest.plan["bytes_before"]
    after = sum(f.bytes for name, f in manifest.files.items() if name.endswith(".safetensors"))
    console.print(
        f"Wrote [bold]{escape(str(result.path))}[/] ({manifest.checkpoint_format}), "
        f"{bytes_text(sum(f.bytes for f in manifest.files.values()))}: {len(manifest.quantized)} matrices quantized, "
        f"{len(manifest.unquantized)} kept; weights {bytes_text(before)} -> {bytes_text(after)}.",
        soft_wrap=True,
    )
    notes = [note for key in ("quantization", "lora") for note in manifest.source.get(key, {}).get("notes", [])]
    for line in [*notes, *(manifest.calibration or {}).get("warnings", [])]:
        console.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)


def print_checks(report: ParityReport, console: Console) -> None:
    """One line per check: its status, its name, and its number or its reason."""
    from rich.markup import escape

    for check in report.checks:
        number = "" if check.value is None else f" {check.metric} {check.limit:g}: {check.value:.3g}"
        reason = f" ({check.reason})" if check.reason else ""
        status = f"[{_COLORS[check.status]}]{check.status.replace('_', ' ')}[/]"
        console.print(f"{status} {escape(check.name + number + reason)}", soft_wrap=True)
