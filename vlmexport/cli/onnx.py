"""``vlmexport onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.cli.options import FOLDER, calibration_options, lora_option, model_option, onnx_options, trust_option
from vlmexport.cli.push import push_options
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, example
from vlmexport.errors import GateFailedError

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.pipeline import ExportResult
    from vlmexport.plan import OnnxOptions
    from vlmexport.trt_pipeline import TrtResult
    from vlmexport.verify.result import ParityReport


@click.command(
    epilog=example(
        "vlmexport onnx --model demo --out demo-int4",
        "vlmexport onnx --model ./my-finetune --out out --bits 8 --keep '*.layers.0.*'",
    ),
    short_help="Export a model to quantized ONNX graphs and prove them equal to it.",
)
@model_option
@lora_option
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Folder to write.")
@onnx_options
@calibration_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Judge the export when it is made.")
@click.option("--force", is_flag=True, show_default="off", help="Replace DIR if it exists.")
@trust_option
@common_options
@push_options
def command(
    session: Session,
    model: str,
    lora: str | None,
    out: Path,
    options: OnnxOptions,
    calibration: CalibrationOptions,
    verify: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Export MODEL to ONNX graphs with quantized weights, and prove them equal to it.

    DIR appears only when everything went well. An export whose gate fails is kept as DIR.failed, so that it can be
    looked into, and the exit code is 3.
    """
    with session.progress() as progress:
        result = api.export_onnx(
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
        print_and_judge(result.report, console)


def result_data(result: ExportResult | TrtResult) -> dict[str, Any]:
    """The ``--json`` keys of an export."""
    manifest = result.artifact.manifest
    return {
        "path": str(result.artifact.path),
        "layout": manifest.layout,
        "target": manifest.target,
        "size_bytes": sum(f.bytes for f in manifest.files.values()),
        "files": {name: f.bytes for name, f in manifest.files.items()},
        "quantized": len(manifest.quantized),
        "unquantized": len(manifest.unquantized),
        "report": None if result.report is None else result.report.to_dict(),
    }


def print_result(result: ExportResult | TrtResult, console: Console) -> None:
    """Where the export is, what is in it, and what the calibration has to say."""
    from rich.markup import escape
    from rich.table import Table

    manifest = result.artifact.manifest
    table = Table("part", "files")
    table.add_column("size", justify="right")
    for role, part in manifest.parts.items():
        names = [n for n in manifest.files if n == part.file or n.startswith(part.file + "_data")]
        table.add_row(role, ", ".join(names), bytes_text(sum(manifest.files[n].bytes for n in names)))
    console.print(table)
    total = sum(f.bytes for f in manifest.files.values())
    console.print(f"Wrote [bold]{escape(str(result.artifact.path))}[/], {bytes_text(total)}.", soft_wrap=True)
    adapter = manifest.source.get("lora", {}).get("notes", [])
    for line in [*adapter, *(manifest.calibration or {}).get("warnings", [])]:
        console.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)


def print_and_judge(report: ParityReport, console: Console) -> None:
    """Print the gate's report; raises `GateFailedError` when it is red."""
    from vlmexport.verify.report.console import print_report

    print_report(report, console)
    raise_if_failed(report)


def raise_if_failed(report: ParityReport) -> None:
    """Raise `GateFailedError`, naming the first check and part that failed, when the report is red."""
    failures = report.failures()
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        first = failures[0]
        raise GateFailedError(f"the gate failed: {first.part}: {first.reason or first.name}{more}")
