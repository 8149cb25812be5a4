"""``vlmexport gguf``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.cli.onnx import print_and_judge
from vlmexport.cli.options import (
    FOLDER,
    Command,
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
from vlmexport.gguf_options import GgufOptions, gguf_options

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.gguf_options import GgufPlan
    from vlmexport.gguf_pipeline import GgufResult


class TensorType(click.ParamType[tuple[str, str]]):
    """``REGEX=TYPE``: which tensors, and what they are stored as."""

    name = "REGEX=TYPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the last ``=``; fails on anything without one."""
        pattern, equals, kind = str(value).rpartition("=")
        if not (equals and pattern and kind):
            self.fail(f"{value!r} must be REGEX=TYPE, such as 'ffn_down=Q6_K'", param, ctx)
        return pattern, kind.upper()


_OPTIONS = (
    click.option(
        "--quant", default="Q4_K_M", show_default=True, metavar="TYPE",
        help="Type of the text model: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K_S/M/L, Q4_K_S/M, "
        "Q5_K_S/M, Q6_K or an IQ type, mixed as llama-quantize does; or `awq+gptq`, `awq`, `gptq`, `hqq`, `rtn`: codes "
        "of that algorithm, handed over without loss as Q4_0 (or Q4_1, Q8_0).",
    ),
    click.option(
        "--mmproj-type", default="f16", show_default=True, metavar="TYPE",
        help="Type of the vision side: f16, bf16, q8_0 or f32 (K types too, which llama.cpp's own tools rarely use).",
    ),
    click.option(
        "--imatrix", default="auto", show_default=True, metavar="auto|none|FILE",
        help="Importance of each input column: measured on the calibration's image-text prompts (for types that use "
        "it), none, or a file of llama.cpp's llama-imatrix.",
    ),
    click.option(
        "--tensor-type", "tensor_types", type=TensorType(), multiple=True, show_default="none",
        help="Type of the text tensors whose GGUF name matches; may be given again, the first match wins.",
    ),
    click.option(
        "--smooth", type=click.Choice(["none", "awq"]), default="none", show_default=True,
        help="Fold AWQ's scales into the weights before they are quantized to a K type.",
    ),
    click.option(
        "--bits", type=click.Choice(["4", "8"]), default=None, show_default="the method's, mostly 4",
        help="Bits of the codes of an algorithm.",
    ),
    click.option(
        "--symmetric/--asymmetric", default=None, show_default="the method's, mostly symmetric",
        help="Codes of an algorithm: Q4_0, or Q4_1 with zero points.",
    ),
    click.option(
        "--llama-quantize-compatible", "compatible", is_flag=True, show_default="off",
        help="Follow llama-quantize in its quirks too (quantized vision files).",
    ),
)  # fmt: skip


def gguf_choices(function: Command) -> Command:
    """Add the choices of a GGUF export to a command, which gets them as one `GgufOptions` named ``options``."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        keys = ("quant", "mmproj_type", "imatrix", "tensor_types", "smooth", "bits", "symmetric", "compatible")
        options = gguf_options(**{key: values.pop(key) for key in keys}, named=bool(given("quant")))
        return function(*args, options=options, **values)

    return decorate(command, _OPTIONS)


@click.command(
    epilog=example(
        "vlmexport gguf --model demo --out demo-gguf",
        "vlmexport gguf --model ./my-finetune --out out --quant awq+gptq",
        "vlmexport gguf --model ./my-finetune --out out --quant Q4_K_M --smooth awq --tensor-type 'ffn_down=Q6_K'",
    ),
    short_help="Export a model to GGUF for llama.cpp and prove it there.",
)
@model_option
@lora_option
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Folder to write.")
@gguf_choices
@calibration_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Judge the export in llama.cpp.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default="all", help="Threads that quantize.")
@click.option("--force", is_flag=True, show_default="off", help="Replace DIR if it exists.")
@trust_option
@common_options
@push_options
def command(
    session: Session,
    model: str,
    lora: str | None,
    out: Path,
    options: GgufOptions,
    calibration: CalibrationOptions,
    verify: bool,
    threads: int,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Export MODEL to a text GGUF and an mmproj GGUF, and prove them in llama.cpp.

    Both files are written in one pass, without an F16 file in between. DIR appears only when everything went well. An
    export whose gate fails is kept as DIR.failed, and the exit code is 3.
    """
    with session.progress() as progress:
        result = api.export_gguf(
            model,
            out,
            options,
            calibration=calibration,
            verify=verify,
            threads=threads,
            force=force,
            progress=progress,
            lora=lora,
            trust_remote_code=trust_remote_code,
        )
    session.write_json(result_data(result))
    console = session.console()
    print_result(result, console)
    if result.report is not None:
        print_and_judge(result.report, console)


def result_data(result: GgufResult) -> dict[str, Any]:
    """The ``--json`` keys of a GGUF export."""
    manifest = result.artifact.manifest
    return {
        "path": str(result.artifact.path),
        "layout": manifest.layout,
        "target": manifest.target,
        "size_bytes": sum(f.bytes for f in manifest.files.values()),
        "files": {name: f.bytes for name, f in manifest.files.items()},
        "bits_per_weight": manifest.plan["bits_per_weight"],
        "fallbacks": [t.name for t in result.plan.fallbacks],
        "report": None if result.report is None else result.report.to_dict(),
    }


def print_result(result: GgufResult, console: Console) -> None:
    """Both files with their sizes and bits per weight, what fell back, and how to run them."""
    from rich.markup import escape
    from rich.table import Table

    manifest, plan = result.artifact.manifest, result.plan
    table = Table("file", "holds")
    table.add_column("bits per weight", justify="right")
    table.add_column("size", justify="right")
    for role, file in (("decoder", "text"), ("vision_encoder", "mmproj")):
        name = manifest.parts[role].file
        holds = (plan.arch, plan.options.quant) if file == "text" else (plan.projector, plan.options.mmproj_type)
        bits = plan.bits_per_weight("text" if file == "text" else "mmproj")
        table.add_row(name, ", ".join(holds), f"{bits:.2f}", bytes_text(manifest.files[name].bytes))
    console.print(table)
    total = sum(f.bytes for f in manifest.files.values())
    console.print(f"Wrote [bold]{escape(str(result.artifact.path))}[/], {bytes_text(total)}.", soft_wrap=True)
    for line in [*fallback_lines(plan), *_notes(result)]:
        console.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)
    text, mmproj = manifest.parts["decoder"].file, manifest.parts["vision_encoder"].file
    console.print(
        f'Run it: llama-mtmd-cli -m {text} --mmproj {mmproj} --jinja --image FILE -p "..."',
        markup=False,
        soft_wrap=True,
    )


def fallback_lines(plan: GgufPlan) -> list[str]:
    """One line per kind of fall-back: how many tensors are stored as what, and why."""
    found: dict[tuple[str, str, int], int] = {}
    for tensor in plan.fallbacks:
        key = (tensor.wanted, tensor.type, tensor.shape[-1])
        found[key] = found.get(key, 0) + 1
    return [
        f"{count} tensors are {kind} instead of {wanted}: their rows of {columns} are no multiple of its block"
        for (wanted, kind, columns), count in found.items()
    ]


def _notes(result: GgufResult) -> list[str]:
    manifest = result.artifact.manifest
    adapter = manifest.source.get("lora", {}).get("notes", [])
    return [*adapter, *manifest.model["gguf"]["notes"], *(manifest.calibration or {}).get("warnings", [])]
