"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import BITS, QuantScheme
from vlmexport.target import target_names

Command = Callable[..., Any]

MODEL_HELP = "Folder of a Hugging Face model, a hub id (`name/model`, `name/model@revision`), or `demo`."
TARGET_DEFAULT = "the target's"
# A path that must not exist yet is no concern of click's: our own messages say more.
FOLDER = click.Path(path_type=Path)

model_argument = click.argument("model", metavar="MODEL")
model_option = click.option("--model", required=True, metavar="MODEL", help=MODEL_HELP)
reference_option = click.option(
    "--model", default=None, metavar="MODEL", show_default="the one it was exported from",
    help="The original model to compare with.",
)  # fmt: skip
trust_option = click.option(
    "--trust-remote-code", is_flag=True, show_default="off", help="Run Python code that ships with the model."
)
artifact_argument = click.argument("artifact", metavar="DIR", type=FOLDER)


def onnx_options(function: Command) -> Command:
    """Add the choices of an ONNX export to a command, which gets them as one `OnnxOptions` named ``options``."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        options = OnnxOptions(
            target=values.pop("target"),
            layout=values.pop("layout"),
            scheme=_scheme(values),
            encoder_dtype=values.pop("encoder_dtype"),
            decoder_dtype=values.pop("decoder_dtype"),
            lm_head=values.pop("lm_head"),
            attention=values.pop("attention"),
            keep=values.pop("keep"),
        )
        return function(*args, options=options, **values)

    return _decorate(command, _ONNX_OPTIONS)


def _scheme(values: dict[str, Any]) -> QuantScheme | None:
    quant, bits = values.pop("quant"), values.pop("bits")
    group_size, symmetric = values.pop("group_size"), values.pop("symmetric")
    if quant == "none":
        _refuse_unused("bits", "group_size", "symmetric")
        return None
    return QuantScheme(bits=bits, symmetric=symmetric, group_size=group_size, algorithm=quant)


def _refuse_unused(*names: str) -> None:
    context = click.get_current_context()
    given = [n for n in names if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} has no effect with --quant none")


def _decorate(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


_DTYPES = click.Choice(["fp16", "fp32"])

_ONNX_OPTIONS = (
    click.option(
        "--quant", type=click.Choice(["none", "rtn"]), default="rtn", show_default=True,
        help="How decoder weights are quantized; `none` keeps them at --decoder-dtype.",
    ),
    click.option("--bits", type=click.Choice(BITS), default=4, show_default=True, help="Bits per quantized weight."),
    click.option(
        "--group-size", type=int, default=32, show_default=True,
        help="Input features that share one scale: 16, 32, 64, 128 or 256.",
    ),
    click.option(
        "--symmetric/--asymmetric", default=True, show_default=True,
        help="Fixed zero point, or one zero point per group.",
    ),
    click.option(
        "--encoder-dtype", type=_DTYPES, default=None, show_default=TARGET_DEFAULT,
        help="Storage of the vision encoder and the projector.",
    ),
    click.option(
        "--decoder-dtype", type=_DTYPES, default=None, show_default=TARGET_DEFAULT,
        help="Activations, KV cache and unquantized weights of the decoder.",
    ),
    click.option(
        "--lm-head", type=click.Choice(["quantized", "fp16"]), default="quantized", show_default=True,
        help="The LM head: quantized like the decoder, or kept.",
    ),
    click.option(
        "--attention", type=click.Choice(["gqa", "standard"]), default="gqa", show_default=True,
        help="`gqa` is fast and takes right padding; `standard` takes left padding too.",
    ),
    click.option(
        "--layout", type=click.Choice(["split"]), default="split", show_default=True, help="Files of the export."
    ),
    click.option(
        "--target", type=click.Choice(target_names()), default="cpu", show_default=True,
        help="What the export will run on.",
    ),
    click.option(
        "--keep", multiple=True, metavar="PATTERN", show_default="none",
        help="Leave weights with such names unquantized (`*.layers.0.*`); may be given again.",
    ),
)  # fmt: skip
