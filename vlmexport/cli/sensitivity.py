"""``vlmexport sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.options import FOLDER, QuantChoice, calibration_options, lora_option, model_argument, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example
from vlmexport.quantize.registry import ALGORITHMS, CHOICES
from vlmexport.quantize.scheme import BITS, make_scheme

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.calibrate.sensitivity import ModuleEffect, Sensitivity

_DATA_FREE = [name for name in CHOICES if not ALGORITHMS[name].calibrated]


@click.command(
    epilog=example(
        "vlmexport sensitivity demo",
        "vlmexport sensitivity ./my-finetune --bits 4 --group-size 128 --out sensitivity",
    ),
    short_help="Measure what quantizing each module alone does to the answers.",
)
@model_argument
@lora_option
@click.option(
    "--quant", type=QuantChoice(_DATA_FREE), default="rtn", show_default=True, help="Method, one that needs no data."
)
@click.option(
    "--bits", type=click.Choice(BITS), default=None, show_default="the method's, mostly 4", help="Bits per weight."
)
@click.option(
    "--group-size", type=int, default=None, show_default="the method's, mostly 32",
    help="Input features that share one scale, or -1 for all of an output row.",
)  # fmt: skip
@click.option(
    "--symmetric/--asymmetric", default=None, show_default="the method's, mostly symmetric",
    help="Fixed zero point, or one zero point per group.",
)  # fmt: skip
@calibration_options
@click.option(
    "--out", type=FOLDER, default=None, show_default="none", metavar="DIR",
    help="Folder for heat map (PNG, HTML) and numbers (JSON).",
)  # fmt: skip
@trust_option
@common_options
def command(
    session: Session,
    model: str,
    lora: str | None,
    quant: str,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    calibration: CalibrationOptions,
    out: Path | None,
    trust_remote_code: bool,
) -> None:
    """Quantize each decoder module of MODEL alone and measure how far its answers move.

    The table shows KL in nats per token against the original model, layers down and modules across, on samples of
    --calibration (64 unless --calibration-samples says otherwise). Large values name the modules to leave at 8 or 16
    bits: by --keep, or all at once by --quant auto.
    """
    from rich.markup import escape

    scheme = make_scheme(quant, bits, group_size, symmetric)
    with session.progress() as progress:
        found = api.measure_sensitivity(
            model,
            scheme,
            calibration=calibration,
            out=out,
            progress=progress,
            lora=lora,
            trust_remote_code=trust_remote_code,
        )
    session.write_json(found.to_dict())
    print_sensitivity(found, session.console())
    if out is not None:
        where = escape(str(out))
        session.console().print(f"Wrote [bold]{where}[/]: heatmap.png, heatmap.html, sensitivity.json", soft_wrap=True)


def print_sensitivity(found: Sensitivity, console: Console) -> None:
    """The table, layers down and modules across, the strongest fifth in bold."""
    from rich.table import Table

    from vlmexport.calibrate.heatmap import short_kind, short_number, subtitle, title

    strong = sorted((e.kl for e in found.effects), reverse=True)[: max(len(found.effects) // 5, 1)][-1]

    def cell(effect: ModuleEffect | None) -> str:
        if effect is None:
            return ""
        return f"[bold]{short_number(effect.kl)}[/]" if effect.kl >= strong else short_number(effect.kl)

    console.print(title(found), markup=False, soft_wrap=True)
    table = Table("layer")
    for kind in found.kinds:
        table.add_column(short_kind(kind).removesuffix("_proj"), justify="right")
    for layer in found.layers:
        table.add_row(str(layer), *(cell(found.cell(layer, kind)) for kind in found.kinds))
    console.print(table)
    for effect in found.outside:
        console.print(f"{effect.kind}: {cell(effect)}")
    console.print(subtitle(found), markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)
