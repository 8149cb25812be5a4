"""Options that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.dtypes import DEFAULT_DTYPES, WEB_DTYPES, WEB_LAYOUT
from vlmexport.errors import BadInputError
from vlmexport.genai_options import JOINED_LAYOUTS
from vlmexport.plan import OnnxOptions
from vlmexport.plan_file import AutoLimit, QuantPlan, load_plan_file
from vlmexport.quantize.registry import CHOICES, REFUSED, refusal
from vlmexport.quantize.scheme import BITS, DEFAULT_ALGORITHM, QuantScheme, make_scheme
from vlmexport.target import onnx_target_names

Command = Callable[..., Any]

MODEL_HELP = "Folder of a Hugging Face model, a hub id (`name/model`, `name/model@revision`), or `demo`."
TARGET_DEFAULT = "the target's"
# A path that must not exist yet is no concern of click's: our own messages say more.
FOLDER = click.Path(path_type=Path)

model_argument = click.argument("model", metavar="MODEL")
model_option = click.option("--model", required=True, metavar="MODEL", help=MODEL_HELP)
lora_option = click.option(
    "--lora", default=None, metavar="ADAPTER", show_default="none",
    help="LoRA adapter (PEFT's folder, or a hub id) to merge into MODEL before anything else.",
)  # fmt: skip
reference_lora_option = click.option(
    "--lora", default=None, metavar="ADAPTER", show_default="the one it was exported with",
    help="LoRA adapter to merge into the original model.",
)  # fmt: skip
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
        named = given("quant", "bits", "group_size", "symmetric", "clip")
        choice = bit_choice(values)
        options = OnnxOptions(
            target=values.pop("target"),
            layout=values.pop("layout"),
            scheme=_scheme(values),
            encoder_dtype=values.pop("encoder_dtype"),
            decoder_dtype=values.pop("decoder_dtype"),
            lm_head=values.pop("lm_head"),
            attention=values.pop("attention"),
            kv_cache=values.pop("kv_cache"),
            prefill=values.pop("prefill"),
            preprocessor=values.pop("with_preprocessor"),
            keep=values.pop("keep"),
            scheme_named=bool(named),
            choice=choice,
            dtypes=values.pop("dtypes"),
        )
        return function(*args, options=options, **values)

    return decorate(command, _ONNX_OPTIONS)


def bit_choice(values: dict[str, Any]) -> AutoLimit | QuantPlan | None:
    """What settles the bits of each weight: a limit for ``--quant auto``, or a plan file.

    Takes the values of `CHOICE_OPTIONS` out of `values`.
    """
    max_kl, max_size, file = values.pop("max_kl"), values.pop("max_size"), values.pop("plan_file")
    auto = values["quant"] == "auto"
    if file is not None:
        clash = given("quant", "bits", "group_size", "symmetric", "clip", "max_kl", "max_size")
        if clash:
            raise click.UsageError(f"--{clash[0].replace('_', '-')} has no effect with --plan, which names the bits")
        return load_plan_file(file)
    if auto and given("bits"):
        raise click.UsageError("--bits has no effect with --quant auto, which chooses 4, 8 or 16 for each weight")
    if not auto and (max_kl is not None or max_size is not None):
        raise click.UsageError("--max-kl and --max-size are limits for --quant auto")
    return AutoLimit(max_kl, max_size) if auto else None


def _scheme(values: dict[str, Any]) -> QuantScheme | None:
    values["quant"] = DEFAULT_ALGORITHM if values["quant"] == "auto" else values["quant"]
    quant, bits, clip = values.pop("quant"), values.pop("bits"), values.pop("clip")
    group_size, symmetric = values.pop("group_size"), values.pop("symmetric")
    if quant == "none":
        _refuse_unused("bits", "group_size", "symmetric", "clip")
        return None
    return make_scheme(quant, bits, group_size, symmetric, clip)


def calibration_options(function: Command) -> Command:
    """Add the choice of calibration samples to a command, which gets it as a `CalibrationOptions`."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        calibration = CalibrationOptions(
            source=values.pop("calibration"),
            samples=values.pop("calibration_samples"),
            seed=values.pop("calibration_seed"),
            text_only=values.pop("text_only_calibration"),
            skip_unreadable=values.pop("skip_unreadable"),
        )
        return function(*args, calibration=calibration, **values)

    return decorate(command, _CALIBRATION_OPTIONS)


def given(*names: str) -> list[str]:
    """Those of the options `names` that stand on the command line."""
    context = click.get_current_context()
    return [n for n in names if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]


def _refuse_unused(*names: str) -> None:
    unused = given(*names)
    if unused:
        raise click.UsageError(f"--{unused[0].replace('_', '-')} has no effect with --quant none")


def decorate(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    """`command` with `options`, in their order."""
    for option in reversed(options):
        command = option(command)
    return command


class QuantChoice(click.Choice[str]):
    """The methods, and the reason for one that exists and is refused."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType.convert`."""
        if value in REFUSED:
            raise BadInputError(refusal(value))
        return super().convert(value, param, ctx)


class ByteSize(click.ParamType[int]):
    """A number of bytes with a decimal or binary unit: ``1.2GB``, ``800 MB``, ``1GiB``, ``123456``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See `click.ParamType.convert`."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", str(value))
        if match is None:
            self.fail(f"{value!r} is not a size; write it like 1.2GB, 800MB or a number of bytes", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " kMGT".index(match[2].replace("K", "k") or " "))


class Names(click.ParamType[tuple[str, ...]]):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """See `click.ParamType.convert`."""
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


_DTYPES = click.Choice(["fp16", "fp32"])

_CALIBRATION_OPTIONS = (
    click.option(
        "--calibration", default=CalibrationOptions.source, show_default=True, metavar="SOURCE",
        help="What calibrated methods look at: a bundled recipe, a recipe file, a .jsonl file of images and "
        "conversations, a folder of images, or a dataset of the hub (name/dataset@revision).",
    ),
    click.option(
        "--calibration-samples", type=click.IntRange(min=1), default=None, show_default="the recipe's",
        help="Number of samples.",
    ),
    click.option(
        "--calibration-seed", type=click.IntRange(min=0), default=None, show_default="the recipe's",
        help="Which samples are taken.",
    ),
    click.option(
        "--text-only-calibration", is_flag=True, show_default="off",
        help="Calibrate without images; worse for a vision-language model.",
    ),
    click.option(
        "--skip-unreadable", is_flag=True, show_default="off",
        help="Leave out images that cannot be read instead of stopping.",
    ),
)  # fmt: skip

# How codes are chosen, for every command that quantizes.
SCHEME_OPTIONS = (
    click.option(
        "--bits", type=click.Choice(BITS), default=None, show_default="the method's, mostly 4",
        help="Bits per quantized weight.",
    ),
    click.option(
        "--group-size", type=int, default=None, show_default="the method's, mostly 32",
        help="Input features that share one scale: 16, 32, 64, 128 or 256, or -1 for all of an output row.",
    ),
    click.option(
        "--symmetric/--asymmetric", default=None, show_default="the method's, mostly symmetric",
        help="Fixed zero point, or one zero point per group.",
    ),
    click.option(
        "--clip", is_flag=True, show_default="off",
        help="Search a smaller range per group before rounding (awq, gptq, awq+gptq).",
    ),
)  # fmt: skip

# What settles the bits of each weight; read by `bit_choice`.
CHOICE_OPTIONS = (
    click.option(
        "--max-kl", type=float, default=None, show_default="none", metavar="NATS",
        help="Limit for --quant auto: divergence from the original in nats per text token, on held-out samples.",
    ),
    click.option(
        "--max-size", type=ByteSize(), default=None, show_default="none",
        help="Limit for --quant auto: bytes of all weights of the export, such as 1.2GB or 800MB.",
    ),
    click.option(
        "--plan", "plan_file", type=FOLDER, default=None, show_default="none", metavar="FILE",
        help="Bits of each weight from a plan that --quant auto wrote (quantization_plan.json of an export).",
    ),
)  # fmt: skip

KEEP_OPTION = click.option(
        "--keep", multiple=True, metavar="PATTERN", show_default="none",
        help="Leave weights with such names unquantized (`*.layers.0.*`); may be given again.",
    )  # fmt: skip

_ONNX_OPTIONS = (
    click.option(
        "--quant", type=QuantChoice(["none", "auto", *CHOICES]), default=DEFAULT_ALGORITHM, show_default=True,
        help="How decoder weights are quantized; `none` keeps them at --decoder-dtype, `auto` chooses 4, 8 or 16 bits "
        "for each (awq+gptq) so that --max-kl or --max-size is met.",
    ),
    *CHOICE_OPTIONS,
    *SCHEME_OPTIONS,
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
        "--kv-cache", type=click.Choice(["same", "int8"]), default="same", show_default=True,
        help="KV cache: at --decoder-dtype, or 8-bit integers with one scale per channel (a quarter of fp32).",
    ),
    click.option(
        "--prefill", type=click.Choice(["same", "int8"]), default="same", show_default=True,
        help="Prompts: through the graph that decodes, or through INT8 products of their own (CPUs; a larger export).",
    ),
    click.option(
        "--with-preprocessor", is_flag=True, show_default="off",
        help="Add the image processor as a graph (resize, tile, normalise one picture), for runtimes without Python.",
    ),
    click.option(
        "--layout", type=click.Choice(["split", *JOINED_LAYOUTS]), default="split", show_default=True,
        help="Files of the export: one graph per part, what transformers.js loads in browsers and Node, or what "
        "onnxruntime-genai loads.",
    ),
    click.option(
        "--dtypes", type=Names(), default=(), show_default=",".join(DEFAULT_DTYPES), metavar="NAMES",
        help=f"Precisions of --layout {WEB_LAYOUT}, separated by commas: {', '.join(WEB_DTYPES)}.",
    ),
    click.option(
        "--target", type=click.Choice(onnx_target_names()), default="cpu", show_default=True,
        help="What the export will run on.",
    ),
    KEEP_OPTION,
)  # fmt: skip
