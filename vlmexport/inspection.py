"""What `vlmexport inspect` tells about a model: parts, sizes, how images enter, cache, targets, recipe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmexport.checkpoint_plan import FORMATS, CheckpointOptions, plan_checkpoint
from vlmexport.cross_plan import answer_notes, fitting_options, fitting_words
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.gguf_options import GgufOptions, GgufPlan
from vlmexport.gguf_plan import plan_gguf
from vlmexport.model.kv import KVGeometry
from vlmexport.plan import ExportPlan, OnnxOptions, WeightPlan, float_weights, plan_export
from vlmexport.quantize.advice import SMALL_MODEL, quantization_advice
from vlmexport.quantize.scheme import make_scheme
from vlmexport.retrieval_plan import check_retrieval, method_words, usual_options
from vlmexport.target import Target, load_target, onnx_target_names, target_names
from vlmexport.trt_options import TrtOptions, trt_onnx_options, trt_scheme
from vlmexport.trt_plan import check_split, settle_options

if TYPE_CHECKING:
    from vlmexport.model.importers.packed import CodeFormat, QuantizedCheckpoint
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

CONTEXTS = (1024, 4096, 32768)
_PICTURE_SIZES = ((224, 224), (640, 480), (480, 640), (1920, 1080))
_INT4_GROUP = 32
TokenizerCheck: TypeAlias = "Callable[[VLM, GgufPlan], object]"


@dataclass(frozen=True)
class PartReport:
    """One part: `modules` of the PyTorch model, parameters, share of the whole, and bytes at two precisions.

    `int4_bytes` counts every matrix at 4 bits with a float16 scale per 32 input features, and the rest at FP16.
    """

    role: str
    modules: tuple[str, ...]
    parameters: int
    share: float
    fp16_bytes: int
    int4_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """The KV cache of one sequence at FP16, and at INT8 (``--kv-cache int8``); ``*_at`` by context length in tokens.

    `keeping_layers` of the `layers` keep keys and values of their own. `state_bytes`: the states of fixed size that
    layers keep as well, at FP16. `uniform`: all layers keep keys and values of one shape, which alone has an INT8 form.
    """

    layers: int
    heads: int
    head_dim: int
    bytes_per_token: int
    bytes_at: dict[str, int]
    int8_bytes_per_token: int
    int8_bytes_at: dict[str, int]
    keeping_layers: int
    state_bytes: int
    uniform: bool


@dataclass(frozen=True)
class TargetReport:
    """Whether `name` can take the model with its default options, and if not, why."""

    name: str
    can_export: bool
    reason: str


@dataclass(frozen=True)
class Recipe:
    """The suggested export; `command` can be typed as it is, `advice` says what fewer bits would cost."""

    bits: int
    group_size: int
    symmetric: bool
    command: str
    reason: str
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class InspectReport:
    """Everything ``vlmexport inspect`` says; None or empty where a refused split leaves it unknown.

    `quantized` describes the codes of a checkpoint that came quantized (``gptq 4-bit g128 sym``), `quantized_notes`
    what of its recipe an export does not carry on; `lora` is the adapter that was merged, `lora_notes` what to know of
    it. `split_notes`: what the model takes and an export does not.
    """

    model: str
    architecture: str
    model_type: str
    dtype: str
    parameters: int
    parts: tuple[PartReport, ...]
    tied_embeddings: bool
    merge: str | None
    positions: str | None
    image_token_id: int
    tokens_per_image: dict[str, int]
    tokens_per_image_note: str
    kv: CacheReport
    targets: tuple[TargetReport, ...]
    recipe: Recipe
    quantized: str | None = None
    quantized_notes: tuple[str, ...] = ()
    lora: str | None = None
    lora_notes: tuple[str, ...] = ()
    split_notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report with the keys of the CLI reference."""
        return dataclasses.asdict(self)


def inspect_vlm(vlm: VLM, check_tokenizer: TokenizerCheck) -> InspectReport:
    """Describe `vlm`; a model that cannot be split is still described, with the reason at every target.

    `check_tokenizer` raises `BadInputError` or `NotPossibleHereError` when llama.cpp has no such tokenizer; the caller
    hands it in, since this module does not know how files are written.
    """
    from vlmexport.split.capture import split_model

    parameters = sum(p.numel() for p in vlm.model.parameters())
    split, refusal = None, ""
    try:
        split = split_model(vlm)
    except UnsupportedModelError as error:
        refusal = str(error)
    tokens, note = tokens_per_image(vlm)
    targets = tuple(_target_report(name, vlm, split, refusal, check_tokenizer) for name in target_names())
    return InspectReport(
        model=vlm.source,
        architecture=vlm.facts.architecture,
        model_type=vlm.facts.model_type,
        dtype=vlm.facts.dtype,
        parameters=parameters,
        parts=() if split is None else part_reports(vlm, split),
        tied_embeddings=vlm.facts.tied_embeddings,
        merge=None if split is None else split.merge.place,
        positions=None if split is None else split.merge.position,
        image_token_id=vlm.facts.image_token_id,
        tokens_per_image=tokens,
        tokens_per_image_note=note,
        kv=cache_report(_kept_cache(vlm, split)),
        targets=targets,
        recipe=suggest_recipe(_words(vlm, split), parameters, _first_command(split, targets))
        if vlm.quantized is None
        else _kept_recipe(vlm, vlm.quantized, split, targets),
        quantized=None if vlm.quantized is None else vlm.quantized.summary,
        quantized_notes=() if vlm.quantized is None else vlm.quantized.notes,
        lora=None if vlm.lora is None else f"{vlm.lora.source}, {len(vlm.lora.changed)} weights changed",
        lora_notes=() if vlm.lora is None else vlm.lora.notes,
        split_notes=(*(() if split is None else split.notes), *answer_notes(vlm, split)),
    )


def _words(vlm: VLM, split: Split | None) -> str:
    """The model in a suggested command, with the options that it needs."""
    return _model_words(vlm) + method_words(vlm) + fitting_words(split)


def _model_words(vlm: VLM) -> str:
    """What stands for the model in a command: its source, and the adapter that is merged into it."""
    return vlm.source if vlm.lora is None else f"{vlm.source} --lora {vlm.lora.source}"


def part_reports(vlm: VLM, split: Split) -> tuple[PartReport, ...]:
    """Sizes of the four parts. A tied LM head is counted once, with the embedding."""
    weights = [w for w in float_weights(vlm, split, load_target("cpu")) if w.bytes_before]
    total = sum(w.elements for w in weights)
    return tuple(_part_report(str(role), [w for w in weights if w.part == role], total) for role in split.parts)


def _part_report(role: str, weights: list[WeightPlan], total: int) -> PartReport:
    parameters = sum(w.elements for w in weights)
    modules = tuple(dict.fromkeys(_module(w.name) for w in weights))
    int4 = sum(_int4_bytes(w) for w in weights)
    return PartReport(role, modules, parameters, parameters / max(total, 1), 2 * parameters, int4)


def _module(name: str) -> str:
    """``model.text_model`` of ``model.text_model.layers.0...``: enough to recognise a part by."""
    path = name.split(".")[:-1]
    return ".".join(path[:2]) if path[0] == "model" else path[0]


def _int4_bytes(weight: WeightPlan) -> int:
    if len(weight.shape) < 2:
        return 2 * weight.elements
    rows, columns = weight.shape[0], weight.elements // weight.shape[0]
    groups = -(-columns // _INT4_GROUP)
    return -(-weight.elements // 2) + 2 * rows * groups


def cache_report(kv: KVGeometry) -> CacheReport:
    """KV-cache size: ``2 * layers * KV heads * head dim`` values per token, of two bytes and of one."""
    half, int8 = (kv.bytes_per_token(width) for width in (2, 1))
    half_at, int8_at = ({str(n): n * size for n in CONTEXTS} for size in (half, int8))
    sizes = (half, half_at, int8, int8_at)
    return CacheReport(
        kv.layers, kv.heads, kv.head_dim, *sizes, len(kv.keeping), state_bytes=kv.state_bytes(), uniform=kv.uniform
    )


def _kept_cache(vlm: VLM, split: Split | None) -> KVGeometry:
    """What an export keeps from token to token: nothing where it gives embeddings."""
    kv = vlm.facts.kv if split is None else split.kv
    return KVGeometry(0, kv.heads, kv.head_dim) if vlm.facts.output == "embeddings" else kv


def tokens_per_image(vlm: VLM) -> tuple[dict[str, int], str]:
    """Image tokens in the prompt by picture size (``640x480``), as the model's own processor makes them.

    The second value says why the first is empty, or that the number is fixed.
    """
    from vlmexport.split.examples import draw_picture, example_inputs, load_processor

    try:
        processor = load_processor(vlm)
        found = {
            f"{w}x{h}": int(
                (
                    example_inputs(vlm, processor, [draw_picture(w, h)], "?")["input_ids"] == vlm.facts.image_token_id
                ).sum()
            )
            for w, h in _PICTURE_SIZES
        }
    except UnsupportedModelError as error:
        return {}, f"tokens per image are unknown: {error}"
    return found, "the number is fixed" if len(set(found.values())) == 1 else "the number depends on the picture's size"


def _target_report(
    name: str, vlm: VLM, split: Split | None, refusal: str, check_tokenizer: TokenizerCheck
) -> TargetReport:
    target = load_target(name)
    if target.onnx_settings is None:
        return _gguf_report(target, vlm, check_tokenizer)
    if split is None:
        return TargetReport(name, False, refusal)
    try:
        options = fitting_options(split, usual_options(vlm, name))
        if target.runtime == "tensorrt":
            check_split(vlm, split)
            options = settle_options(vlm, split, TrtOptions(trt_onnx_options(trt_scheme("int4")), gpu="")).onnx
        check_retrieval(vlm, options)
        plan: ExportPlan = plan_export(vlm, split, target, options)
    except BadInputError as error:
        return TargetReport(name, False, str(error))
    megabytes = plan.bytes_after / 1e6
    return TargetReport(name, True, f"{target.description}; {megabytes:.1f} MB of weights with the default options")


def _gguf_report(target: Target, vlm: VLM, check_tokenizer: TokenizerCheck) -> TargetReport:
    """Whether llama.cpp has a place for every weight and a tokenizer to write; no split is needed for that."""
    try:
        plan = plan_gguf(vlm, GgufOptions())
        check_tokenizer(vlm, plan)
    except (BadInputError, NotPossibleHereError) as error:
        return TargetReport(target.name, False, str(error))
    megabytes = sum(t.bytes for t in plan.tensors) / 1e6
    return TargetReport(
        target.name, True, f"{target.description}; {megabytes:.1f} MB of weights as {plan.options.quant}"
    )


def _kept_recipe(vlm: VLM, kept: QuantizedCheckpoint, split: Split | None, targets: Sequence[TargetReport]) -> Recipe:
    """What to do with a quantized checkpoint, described by the format that most of its weights have."""
    most: CodeFormat = Counter(
        dataclasses.replace(f, in_features=0, stored=0) for f in kept.formats.values()
    ).most_common(1)[0][0]
    reason = f"the codes of the {kept.method} checkpoint are kept as they are; nothing is rounded again"
    command = f"vlmexport onnx --model {vlm.source} --out OUT"
    able = _onnx_targets(targets)
    if able and OnnxOptions.target not in able:
        command += f" --target {able[0]}"
    if split is not None and not able:
        command, reason = _without_target(vlm, split)
    return Recipe(most.bits, most.group_size, most.symmetric, command, reason)


def _without_target(vlm: VLM, split: Split) -> tuple[str, str]:
    """Command and reason for codes that no target takes."""
    floats = "an ONNX export needs the original weights, or --quant none for floats"
    for name in FORMATS:
        try:
            plan_checkpoint(vlm, split, CheckpointOptions(name, make_scheme(FORMATS[name].default_quant)))
        except BadInputError:
            continue
        command = f"vlmexport quantize --model {vlm.source} --out OUT --format {name}"
        return command, f"no target takes these codes, a {name} checkpoint holds them as they are; {floats}"
    return f"vlmexport onnx --model {vlm.source} --out OUT --quant none", f"no target takes these codes: {floats}"


def _first_command(split: Split | None, targets: Sequence[TargetReport]) -> str:
    """``quantize`` for a model that a checkpoint may hold and no target takes, else ``onnx``."""
    return "onnx" if split is None or _onnx_targets(targets) else "quantize"


def _onnx_targets(targets: Sequence[TargetReport]) -> list[str]:
    return [target.name for target in targets if target.can_export and target.name in onnx_target_names()]


def suggest_recipe(model: str, parameters: int, command_name: str = "onnx") -> Recipe:
    """A first choice by model size: small models lose more from 4 bits, so they get 8 bits first."""
    if parameters < SMALL_MODEL:
        scheme = make_scheme(bits=8)
        reason = "below 3 B parameters 8 bits are the safe first choice; then try 4 bits and read what the gate says"
    else:
        scheme = make_scheme(bits=4)
        reason = "from 3 B parameters on 4 bits in groups of 32 are the first choice; the gate says what they cost"
    command = (
        f"vlmexport {command_name} --model {model} --out OUT --bits {scheme.bits} --group-size {scheme.group_size}"
    )
    advice = quantization_advice(parameters, [make_scheme(bits=4)])
    return Recipe(scheme.bits, scheme.group_size, scheme.symmetric, command, reason, advice)
