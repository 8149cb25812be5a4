"""`TrtPlan`: what an export for a GPU will hold, whether it fits there, and who builds its engines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlmexport.engines import INSTALL_RTX, AxisRange, TrtLimits
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.gpu import RTX_PORTABLE, Gpu, load_gpu
from vlmexport.kept_codes import fitting_group
from vlmexport.plan import ExportPlan, check_options, linear_weights, matches_pattern, plan_export
from vlmexport.quantize.registry import IMPORTED
from vlmexport.quantize.scheme import PER_CHANNEL, make_scheme
from vlmexport.split.parts import Role
from vlmexport.target import load_target
from vlmexport.trt_options import TARGET, USUAL_LENGTH, USUAL_PROMPT, TrtOptions
from vlmexport.trt_prediction import ModelSizes, Prediction, check_fits
from vlmexport.trt_shapes import images_of_a_picture, patches_of_an_image, triton_refusal, vision_axes

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.quantize.scheme import QuantScheme
    from vlmexport.split.parts import Split


@dataclass(frozen=True)
class EngineDecision:
    """Who builds the engines: `builder` is empty where nobody does here, and then `reason` says why."""

    builder: Literal["rtx", "trt", ""]
    reason: str


@dataclass(frozen=True)
class TrtPlan:
    """The graphs' plan, the GPU, the sizes that engines are built for, the prediction and who builds.

    `vision_axes` are the ranges of the symbolic axes of the vision encoder and the projector; `notes` are what a user
    may not have meant.
    """

    export: ExportPlan
    options: TrtOptions
    gpu: Gpu
    limits: TrtLimits
    vision_axes: dict[str, AxisRange]
    prediction: Prediction
    engines: EngineDecision
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            **self.export.to_dict(),
            "gpu": dataclasses.asdict(self.gpu),
            "limits": dataclasses.asdict(self.limits),
            "prediction": self.prediction.to_dict(),
            "notes": self.notes,
            "engines": {
                **dataclasses.asdict(self.engines),
                "backend": self.options.backend,
                "portable": self.options.portable,
                "two_decoders": self.options.two_decoders,
                "triton": self.options.triton,
            },
        }


def check_trt_options(options: TrtOptions, rtx_version: str | None) -> tuple[Gpu, EngineDecision]:
    """The GPU and who builds its engines, before a model is loaded.

    `rtx_version` is that of the installed TensorRT for RTX (None: not installed). Raises `BadInputError` for an unknown
    GPU or weights that it does not take, `NotPossibleHereError` where engines were asked for and cannot be built.
    """
    gpu = load_gpu(options.gpu)
    check_options(options.onnx, load_target(TARGET))
    asked = (("--max-batch", options.max_batch, 1), ("--max-seq", options.max_seq, 2))
    more = (("--max-images", options.max_images, 1), ("--max-prompt", options.max_prompt, 1))
    for name, value, least in (*asked, *more):
        if value is not None and value < least:
            raise BadInputError(f"{name} is {value}; it must be {least} or more")
    if options.onnx.scheme is not None:
        gpu.check_weights(f"int{options.onnx.scheme.bits}")
    return gpu, decide_engines(options, gpu, rtx_version)


def decide_engines(options: TrtOptions, gpu: Gpu, rtx_version: str | None) -> EngineDecision:
    """Who builds: TensorRT for RTX where it is installed and has the GPU among its targets, else nobody here.

    Raises `NotPossibleHereError` when engines were asked for (``--engines``, ``--backend rtx``) and cannot be built.
    """
    if options.engines is False or options.backend == "script":
        if options.engines:
            raise BadInputError("--engines and --backend script exclude each other: a script builds nothing here")
        if options.portable:
            raise BadInputError("--portable has no effect without engines that TensorRT for RTX builds here")
        asked = "--no-engines" if options.engines is False else "--backend script"
        return EngineDecision("", f"{asked} was given")
    wanted = options.engines is True or options.backend == "rtx"
    reason = ""
    if options.backend == "trt":
        if options.portable:
            raise BadInputError("--portable needs TensorRT for RTX; TensorRT proper builds for the GPU that it is on")
        return _decide_tensorrt(options, gpu)
    if options.portable and gpu.compute_capability not in RTX_PORTABLE:
        reason = (
            f"a portable engine of TensorRT for RTX is for compute capability {', '.join(RTX_PORTABLE)}, and "
            f"{gpu.title} has {gpu.compute_capability}; leave out --portable"
        )
    elif not gpu.rtx:
        reason = (
            f"TensorRT for RTX has no target for {gpu.title} (compute capability {gpu.compute_capability}), and "
            "TensorRT proper builds on the GPU itself: run build_engines.sh there"
        )
    elif rtx_version is None:
        reason = f"TensorRT for RTX is not installed; run `{INSTALL_RTX}`"
    if reason and wanted:
        raise NotPossibleHereError(f"engine not built: {reason}")
    return EngineDecision("" if reason else "rtx", reason)


def _decide_tensorrt(options: TrtOptions, gpu: Gpu) -> EngineDecision:
    """TensorRT proper: only with its bindings and the very GPU in this machine."""
    from vlmexport.runtime.tensorrt.bindings import installed_flavours
    from vlmexport.runtime.tensorrt.cuda import gpu_status

    status, version = gpu_status(), installed_flavours().get("trt")
    if version is None:
        reason = "TensorRT proper is not installed here, and builds on the GPU itself: run build_engines.sh there"
    elif not status.present:
        reason = f"TensorRT {version} needs the GPU to build for, and {status.reason}: run build_engines.sh there"
    elif status.compute_capability != gpu.compute_capability:
        reason = (
            f"the GPU here is {status.name} ({status.compute_capability}), not {gpu.title} ({gpu.compute_capability}): "
            "run build_engines.sh there"
        )
    else:
        return EngineDecision("trt", "")
    if options.engines:
        raise NotPossibleHereError(f"engine not built: {reason}")
    return EngineDecision("", reason)


def plan_trt(vlm: VLM, split: Split, options: TrtOptions, rtx_version: str | None) -> TrtPlan:
    """Settle what depends on the model, and decide the rest.

    Raises as `check_trt_options` and `plan_export`, and `BadInputError` when the weights and the static cache do not
    fit the GPU's memory, or the cache is longer than the model's positions.
    """
    gpu, engines = check_trt_options(options, rtx_version)
    check_split(vlm, split)
    options = settle_options(vlm, split, options)
    if options.triton is not None and (refusal := triton_refusal(split)):
        raise BadInputError(refusal)
    export = plan_export(vlm, split, load_target(TARGET), options.onnx)
    for bits in sorted({scheme.bits for scheme in export.schemes.values()}):
        gpu.check_weights(f"int{bits}")
    usual = images_of_a_picture(vlm, split)
    images = options.max_images or usual
    length = _length(options)
    limits = TrtLimits(options.max_batch, length, images, min(options.max_prompt or USUAL_PROMPT, length))
    patches = patches_of_an_image(vlm, split)
    sizes = ModelSizes.from_plan(export, vlm, patches, two_decoders=options.two_decoders)
    prediction = check_fits(gpu, sizes, limits)
    axes = vision_axes(split, limits)
    return TrtPlan(export, options, gpu, limits, axes, prediction, engines, _notes(images, usual))


def _notes(images: int, usual: int) -> tuple[str, ...]:
    if images >= usual:
        return ()
    few = f"--max-images {images} is fewer than the {usual} images that the processor makes of one usual picture"
    return (f"{few}; larger pictures will be refused by the engines",)


def check_split(vlm: VLM, split: Split) -> None:
    """Raise `UnsupportedModelError` for a model that ONNX Runtime gets and engines do not."""
    if split.merge.crosses:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: its decoder attends to states beside its own tokens, which engines have no form "
            "for yet; `vlmexport onnx` writes a form of this model for ONNX Runtime"
        )
    if more := further_inputs(split):
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: its decoder takes {', '.join(more)} beside embeddings, which what runs engines "
            "does not hand on yet; `vlmexport onnx` writes a form of this model for ONNX Runtime"
        )
    if not split.kv.uniform:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the layers of its decoder keep different things from token to token, for which "
            "engines have no cache yet; `vlmexport onnx` writes a form of this model for ONNX Runtime"
        )
    if split.merge.pictures is not None:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: its vision encoder takes one picture of any size at a time, and which sizes an "
            "engine must take is not planned yet; `vlmexport onnx` writes a form of this model for ONNX Runtime"
        )


def further_inputs(split: Split) -> tuple[str, ...]:
    """What the decoder takes beside embeddings: positions on three axes, additions, blocks that see each other."""
    blocks = ("block_ids",) if split.merge.mask != "causal" else ()
    return tuple(dict.fromkeys([*split.merge.extras, *blocks]))


def settle_options(vlm: VLM, split: Split, options: TrtOptions) -> TrtOptions:
    """`options` with the cache's length and the block size that this model allows."""
    text = vlm.model.config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", 0) or 0)
    length = options.max_seq or min(USUAL_LENGTH, positions or USUAL_LENGTH)
    if positions and length > positions:
        raise BadInputError(
            f"--max-seq is {length}; {vlm.facts.model_type} has {positions} positions (max_position_embeddings)"
        )
    onnx = dataclasses.replace(options.onnx, cache_length=length, scheme=_settled_scheme(vlm, split, options))
    return dataclasses.replace(options, onnx=onnx, max_seq=length)


def _settled_scheme(vlm: VLM, split: Split, options: TrtOptions) -> QuantScheme | None:
    """The scheme with a block that divides the decoder's widths, unless the user named one."""
    scheme = options.onnx.scheme
    if scheme is None or scheme.algorithm == IMPORTED:
        return scheme
    if vlm.quantized is not None and not options.onnx.scheme_named:
        return make_scheme()  # what stands for "no choice" beside codes that are kept
    if options.group_named or scheme.group_size == PER_CHANNEL:
        return scheme
    linear, head = linear_weights(vlm), vlm.model.get_output_embeddings().weight
    skip_head = options.onnx.lm_head == "fp16"
    decoder = split.parts[Role.DECODER]
    names = {id(p): n for n, p in vlm.model.named_parameters(remove_duplicate=False) if n in linear}
    widths = {
        parameter.shape[1]
        for parameter in decoder.module.parameters()
        if (name := names.get(id(parameter))) is not None
        and not any(matches_pattern(name, pattern) for pattern in options.onnx.keep)
        and not (skip_head and parameter is head)
    }
    if not widths:
        return scheme
    sizes = [s for s in load_target(TARGET).quantization.group_sizes[str(scheme.bits)] if s != PER_CHANNEL]
    return dataclasses.replace(scheme, group_size=fitting_group(widths, sizes, vlm.facts.model_type))


def _length(options: TrtOptions) -> int:
    if options.max_seq is None:
        raise ValueError("the cache's length was not settled")
    return options.max_seq
