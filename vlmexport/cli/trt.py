"""``vlmexport trt``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.cli.onnx import print_and_judge, result_data
from vlmexport.cli.onnx import print_result as print_graphs
from vlmexport.cli.options import (
    FOLDER,
    KEEP_OPTION,
    Command,
    QuantChoice,
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
from vlmexport.engines import LIBRARIES
from vlmexport.quantize.registry import CHOICES
from vlmexport.trt_options import PRECISIONS, USUAL_LENGTH, TrtOptions, trt_onnx_options, trt_scheme

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.trt_pipeline import TrtResult


def _list_gpus(context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """``--gpu list`` prints the profiles and ends."""
    if value != "list":
        return value
    from rich.console import Console
    from rich.table import Table

    from vlmexport.gpu import all_gpus

    table = Table("--gpu", "CUDA", box=None, pad_edge=False)
    for name in ("GB", "GB/s", "FP16 TFLOPS"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("weights", "engines by RTX"):
        table.add_column(name, no_wrap=True)
    for gpu in all_gpus():
        memory = f"{gpu.memory / 1e9:g}" + ("*" if gpu.shared_memory else "")
        rates = f"{gpu.bandwidth / 1e9:g}", f"{gpu.fp16_flops / 1e12:g}"
        weights = " ".join(gpu.weights)
        table.add_row(gpu.name, gpu.compute_capability, memory, *rates, weights, f"here, {gpu.rtx}" if gpu.rtx else "-")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "By data sheets; FP16 dense, on tensor cores. * shared with the CPU. TensorRT proper builds on each of them."
    )
    for gpu in all_gpus():
        if gpu.note:
            console.print(f"{gpu.name}: {gpu.note}", style="dim")
    context.exit(0)


_OPTIONS = (
    click.option(
        "--gpu", required=True, metavar="GPU", is_eager=True, callback=_list_gpus,
        help="The GPU to build for, such as a100 (the 80 GB one), a100-40, rtx-4090 or h100; `list` prints them all.",
    ),
    click.option(
        "--quant", type=QuantChoice([*PRECISIONS, *CHOICES]), default="int4", show_default=True,
        help="Weights of the decoder: `fp16`, `int4` (awq+gptq in symmetric blocks of 128), `int8` (one scale per "
        "output channel), or an algorithm by name.",
    ),
    click.option(
        "--bits", type=click.Choice([4, 8]), default=None, show_default="the algorithm's, mostly 4",
        help="Bits of an algorithm's codes.",
    ),
    click.option(
        "--group-size", type=int, default=None, show_default="128, or what divides the model's widths",
        help="Input features that share one scale: 32, 64 or 128 with 4 bits.",
    ),
    click.option(
        "--clip", is_flag=True, show_default="off",
        help="Search a smaller range per group before rounding (awq, gptq, awq+gptq).",
    ),
    click.option(
        "--requantize", is_flag=True, show_default="off",
        help="Round codes of a quantized checkpoint again where TensorRT cannot hold them (asymmetric, NF4).",
    ),
    click.option(
        "--lm-head", type=click.Choice(["quantized", "fp16"]), default="quantized", show_default=True,
        help="The LM head: quantized like the decoder, or kept.",
    ),
    KEEP_OPTION,
    click.option(
        "--max-batch", type=int, default=1, show_default=True, metavar="N", help="Sequences that engines take at once.",
    ),
    click.option(
        "--max-seq", type=int, default=None, show_default=f"{USUAL_LENGTH}, or the model's positions", metavar="N",
        help="Tokens of one sequence, prompt and answer: the length of the static KV cache.",
    ),
    click.option(
        "--max-prompt", type=int, default=None, show_default="2048, or the cache's length", metavar="N",
        help="New tokens of a sequence in one call; longer prompts go through in several. The workspace grows with it.",
    ),
    click.option(
        "--max-images", type=int, default=None, show_default="as many as the processor makes of one picture",
        metavar="N", help="Images, or tiles of images, that the vision encoder takes at once.",
    ),
    click.option(
        "--backend", type=click.Choice(["auto", "rtx", "trt", "script"]), default="auto", show_default=True,
        help="Who builds engines: TensorRT for RTX without a GPU, TensorRT proper on this machine's GPU, or only the "
        "script. `auto` takes RTX where it is installed and has the GPU among its targets; `rtx` ends with exit code 4 "
        "where it cannot build, `trt` writes the script then.",
    ),
    click.option(
        "--engines/--no-engines", default=None, show_default="where they can be built",
        help="Ask for engines (exit code 4 where they cannot be built here), or leave them out.",
    ),
    click.option(
        "--portable", is_flag=True, show_default="off",
        help="One RTX engine for all of its architectures from 8.0 on, instead of the GPU's own.",
    ),
    click.option(
        "--two-decoders", is_flag=True, show_default="off",
        help="An engine each for prompts and for single tokens, instead of one with two profiles.",
    ),
    click.option(
        "--triton", type=click.Choice(["tensorrt", "onnxruntime"]), is_flag=False, flag_value="tensorrt", default=None,
        show_default="none", metavar="[BACKEND]",
        help="Write a Triton model repository, too: for engines that build_engines.sh makes with TensorRT proper, or "
        "(`onnxruntime`) for the ONNX files.",
    ),
)  # fmt: skip


# Options that are fields of `TrtOptions`.
_PASSED_ON = (
    "gpu", "backend", "max_batch", "max_seq", "max_images", "max_prompt", "engines", "triton", "portable",
    "two_decoders",
)  # fmt: skip


def trt_choices(function: Command) -> Command:
    """Add the choices of a TensorRT export to a command, which gets them as one `TrtOptions` named ``options``."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        quant, bits, size, clip = (values.pop(name) for name in ("quant", "bits", "group_size", "clip"))
        onnx = trt_onnx_options(
            trt_scheme(quant, bits=bits, group_size=size, clip=clip),
            lm_head=values.pop("lm_head"),
            keep=values.pop("keep"),
            requantize=values.pop("requantize"),
            scheme_named=bool(given("quant", "bits", "group_size", "clip")),
        )
        chosen = {name: values.pop(name) for name in _PASSED_ON}
        return function(*args, options=TrtOptions(onnx, **chosen, group_named=size is not None), **values)

    return decorate(command, _OPTIONS)


@click.command(
    epilog=example(
        "vlmexport trt --model demo --gpu a100 --out demo-trt",
        "vlmexport trt --gpu list",
        "vlmexport trt --model ./my-finetune --gpu rtx-4090 --out out --quant fp16 --max-batch 4 --max-seq 8192",
        "vlmexport trt --model ./my-finetune --gpu h100 --out out --triton",
    ),
    short_help="Export a model for TensorRT: graphs, engines, build scripts, Triton.",
)
@model_option
@lora_option
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Folder to write.")
@trt_choices
@calibration_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Judge the graphs in ONNX Runtime.")
@click.option("--force", is_flag=True, show_default="off", help="Replace DIR if it exists.")
@trust_option
@common_options
@push_options
def command(
    session: Session,
    model: str,
    lora: str | None,
    out: Path,
    options: TrtOptions,
    calibration: CalibrationOptions,
    verify: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Export MODEL for TensorRT on a GPU that need not be here.

    The graphs are judged in ONNX Runtime on the CPU. Engines are built without a GPU where TensorRT for RTX can;
    build_engines.sh builds them with TensorRT proper on the machine that has the GPU. An engine that was not run is
    reported as not run. DIR appears only when everything went well; an export whose gate fails is kept as DIR.failed,
    and the exit code is 3.
    """
    with session.progress() as progress:
        result = api.export_trt(
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
    session.write_json(trt_data(result))
    console = session.console()
    print_result(result, console)
    if result.report is not None:
        print_and_judge(result.report, console)


def trt_data(result: TrtResult) -> dict[str, Any]:
    """The ``--json`` keys of a TensorRT export: those of `onnx`, and the GPU, sizes, engines and prediction."""
    return {**result_data(result), "tensorrt": result.artifact.manifest.model["tensorrt"]}


def print_result(result: TrtResult, console: Console) -> None:
    """The graphs, the prediction, the engines that were built and the reason for those that were not."""
    from rich.table import Table

    print_graphs(result, console)
    plan = result.plan
    for line in plan.prediction.lines():
        console.print(line, style="dim", markup=False, soft_wrap=True)
    for line in (*plan.notes, *result.warnings):
        console.print(f"note: {line}", style="yellow", markup=False, soft_wrap=True)
    if result.built:
        table = Table("engine", "for")
        for name in ("size", "build time"):
            table.add_column(name, justify="right")
        for engine in result.built:
            table.add_row(
                engine.sidecar.spec.name,
                engine.place,
                bytes_text(engine.result.bytes),
                f"{engine.result.seconds:.1f} s",
            )
        console.print(table)
        first = result.built[0]
        library = f"{LIBRARIES[first.sidecar.flavour]} {first.version}"
        console.print(f"Engines were built by {library} and not run.", soft_wrap=True)
    else:
        console.print(f"engine not built: {plan.engines.reason}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"Build for {plan.gpu.title} with TensorRT proper: copy the folder there and run ./build_engines.sh",
        markup=False,
        soft_wrap=True,
    )
