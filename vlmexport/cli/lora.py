"""``vlmexport lora``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.cli.options import MODEL_HELP, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import bytes_text, example

if TYPE_CHECKING:
    from vlmexport.lower.gguf.adapter import AdapterGguf

_FILE = click.Path(path_type=Path)


@click.command(
    epilog=example(
        "vlmexport lora ./my-adapter --to gguf",
        "vlmexport lora ./my-adapter --to gguf --base ./base --out my-adapter-f16.gguf --outtype f16",
    ),
    short_help="Write a LoRA adapter as a GGUF file for llama.cpp.",
)
@click.argument("adapter", metavar="ADAPTER")
@click.option("--to", "form", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="Form of the file.")
@click.option(
    "--base", "model", default=None, show_default="the folder that the adapter names", metavar="MODEL",
    help=f"The adapter's base. {MODEL_HELP}",
)  # fmt: skip
@click.option(
    "--out", default=None, type=_FILE, show_default="ADAPTER's name with .gguf", metavar="FILE", help="File to write."
)
@click.option(
    "--outtype", type=click.Choice(["f32", "f16"]), default="f32", show_default=True, help="Type of the matrices."
)
@click.option("--force", is_flag=True, show_default="off", help="Replace FILE if it exists.")
@trust_option
@common_options
def command(
    session: Session,
    adapter: str,
    form: str,
    model: str | None,
    out: Path | None,
    outtype: str,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Write the LoRA ADAPTER (PEFT's folder, or a hub id) as a file that llama.cpp loads over its base.

    The base's GGUF stays as it is: `llama-mtmd-cli -m BASE.gguf --mmproj MMPROJ.gguf --lora FILE`. llama.cpp's adapters
    reach the text model only; an adapter that also changes the vision side is merged by `--lora` of `vlmexport gguf`.
    """
    with session.progress() as progress:
        made = api.export_lora(
            adapter,
            out or Path(f"{Path(adapter).resolve().name}.gguf"),
            base=model,
            outtype=outtype,
            force=force,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    session.write_json(result_data(made, form))
    size, count = bytes_text(made.bytes), len(made.changed)
    line = f"Wrote {made.path}, {size}: {count} matrices of {made.arch}, alpha {made.alpha:g}."
    session.console().print(line, markup=False, soft_wrap=True)


def result_data(made: AdapterGguf, form: str) -> dict[str, Any]:
    """The ``--json`` keys of an adapter file."""
    return {
        "path": str(made.path),
        "form": form,
        "arch": made.arch,
        "alpha": made.alpha,
        "changed": list(made.changed),
        "size_bytes": made.bytes,
    }
