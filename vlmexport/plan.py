"""`ExportPlan`: what an export will do to every weight, decided before any work is done."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from vlmexport.cross_plan import check_cross
from vlmexport.errors import BadInputError
from vlmexport.expert_plan import PlannedExperts, plan_experts
from vlmexport.genai_options import check_genai_options
from vlmexport.kept_codes import check_kept, kept_scheme, requantized_scheme
from vlmexport.owners import OwnedParameter, owned_parameters
from vlmexport.prefill import check_prefill, prompt_bytes, prompt_schemes
from vlmexport.quantize.advice import quantization_advice
from vlmexport.quantize.blocks import block_size
from vlmexport.quantize.registry import algorithm, check_installed
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme, make_scheme

if TYPE_CHECKING:
    import torch

    from vlmexport.model.importers.packed import QuantizedCheckpoint
    from vlmexport.model.load import VLM
    from vlmexport.plan_file import AutoLimit, QuantPlan
    from vlmexport.split.parts import Split
    from vlmexport.target import Target

Action = Literal["quantize", "keep", "drop"]
Dtype = Literal["fp16", "fp32"]
KVCache = Literal["same", "int8"]
Prefill = Literal["same", "int8"]
NUMPY_DTYPES = {"fp16": "float16", "fp32": "float32"}
_BYTES = {"float16": 2, "float32": 4}
ONCE = "runs once for each prompt: not quantized"
_AGAIN = "rounded again (--requantize)"


@dataclass(frozen=True)
class OnnxOptions:
    """The choices of ``vlmexport onnx``; None means the target's default.

    `scheme` None keeps the decoder's weights at `decoder_dtype` (``--quant none``). `keep` are `fnmatch` patterns of
    weight names that stay unquantized. `scheme_named` says that the user asked for `scheme`: it is no default then that
    gives way to the codes of a quantized checkpoint. `kv_cache` "same" stores the cache at `decoder_dtype`; `prefill`
    "same" runs prompts through the graph that decodes. `preprocessor` adds the image processor as a graph. `choice` is
    what ``--quant auto`` has to meet (starting from `scheme`) or a plan file; it must be settled
    (`vlmexport.calibrate.auto.settle_bits`) before anything is planned.
    `cache_length`: tokens of the cache of the ``static`` form of attention, which is TensorRT's and needs it.
    `requantize`: codes of a quantized checkpoint that the target cannot hold are rounded again, to symmetric integers.
    `dtypes`: precisions of the ``transformersjs`` layout, see `vlmexport.dtypes.settle_dtypes`; none in other layouts.
    """

    target: str = "cpu"
    layout: str = "split"
    scheme: QuantScheme | None = field(default_factory=make_scheme)
    encoder_dtype: Dtype | None = None
    decoder_dtype: Dtype | None = None
    lm_head: Literal["quantized", "fp16"] = "quantized"
    attention: Literal["gqa", "standard", "static"] = "gqa"
    kv_cache: KVCache = "same"
    prefill: Prefill = "same"
    preprocessor: bool = False
    keep: tuple[str, ...] = ()
    scheme_named: bool = False
    choice: AutoLimit | QuantPlan | None = None
    cache_length: int | None = None
    requantize: bool = False
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightPlan:
    """What happens to one weight: quantized with `scheme`, kept as `dtype`, or dropped because nothing uses it.

    `name` is the name in the PyTorch model, `part` the part's role, `shape` the checkpoint's shape; `dtype` is a numpy
    name (``float16``) or ``int4`` and the like when quantized. Byte counts are of the checkpoint (`bytes_before`; 0 for
    the LM head that is tied to the embedding) and of the export (`bytes_after`).
    """

    name: str
    part: str
    shape: tuple[int, ...]
    action: Action
    dtype: str
    reason: str
    scheme: QuantScheme | None
    bytes_before: int
    bytes_after: int

    @property
    def elements(self) -> int:
        """Number of values in the weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightGroup:
    """Weights that differ in their layer number only and meet the same fate."""

    weights: tuple[WeightPlan, ...]

    @property
    def pattern(self) -> str:
        """Their common name, with ``*`` for the layer number; the name itself when there is only one."""
        name = self.weights[0].name
        return layer_pattern(name) if len(self.weights) > 1 else name

    @property
    def bytes_before(self) -> int:
        """Checkpoint bytes of the whole group."""
        return sum(w.bytes_before for w in self.weights)

    @property
    def bytes_after(self) -> int:
        """Exported bytes of the whole group."""
        return sum(w.bytes_after for w in self.weights)


@dataclass(frozen=True)
class ExportPlan:
    """Family x options x target, resolved per weight; `kv_bytes_per_token` are the cache's, for one sequence.

    `prefill_bytes` are those of the prompt graph's own matrices, on top of `bytes_after`; 0 without one. `state_bytes`:
    what layers keep of a sequence beside the cache, however long it is.
    """

    architecture: str
    options: OnnxOptions
    encoder_dtype: Dtype
    decoder_dtype: Dtype
    weights: tuple[WeightPlan, ...]
    kv_bytes_per_token: int = 0
    prefill_bytes: int = 0
    state_bytes: int = 0

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the checkpoint."""
        return sum(w.bytes_before for w in self.weights)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights in the export (graphs and processor files come on top)."""
        return sum(w.bytes_after for w in self.weights)

    @cached_property
    def by_name(self) -> dict[str, WeightPlan]:
        """The weights by name."""
        return {w.name: w for w in self.weights}

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """The schemes of the weights to be quantized, by name."""
        return {w.name: w.scheme for w in self.weights if w.scheme is not None}

    @property
    def requantized(self) -> tuple[str, ...]:
        """Weights whose codes of a quantized checkpoint are rounded again."""
        return tuple(w.name for w in self.weights if w.scheme is not None and w.reason.startswith(_AGAIN))

    @property
    def advice(self) -> tuple[str, ...]:
        """What to know of the chosen bits before they are spent."""
        return quantization_advice(sum(w.elements for w in self.weights if w.bytes_before), self.schemes.values())

    def weight(self, name: str) -> WeightPlan:
        """The plan of one weight, an expert's being its parameter's; KeyError when the plan does not know it."""
        whole, _, number = name.rpartition(".")
        return self.by_name[whole if number.isdecimal() and name not in self.by_name else name]

    def groups(self) -> tuple[WeightGroup, ...]:
        """The weights with repeated layers collapsed, in the order of first appearance."""
        found: dict[tuple[object, ...], list[WeightPlan]] = {}
        for w in self.weights:
            key = (layer_pattern(w.name), w.part, w.shape, w.action, w.dtype, w.reason, str(w.scheme))
            found.setdefault(key, []).append(w)
        return tuple(WeightGroup(tuple(weights)) for weights in found.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        totals: dict[str, Any] = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        totals["advice"] = self.advice
        return {**dataclasses.asdict(self), **totals}


def layer_pattern(name: str) -> str:
    """A weight's name with ``*`` for the layer number."""
    return re.sub(r"\.\d+\.", ".*.", name)


def check_options(options: OnnxOptions, target: Target) -> None:
    """Refuse what `target` cannot take, before a model is loaded.

    Raises `BadInputError` with the target's own reason, `NotPossibleHereError` for a method whose package is missing.
    """
    if options.layout not in target.layouts:
        raise BadInputError(
            f"target {target.name} has no layout {options.layout!r}; it has {', '.join(target.layouts)}"
        )
    if (options.attention == "static") != (target.onnx.dialect == "tensorrt") or (
        (options.attention == "static") != (options.cache_length is not None)
    ):
        raise BadInputError(
            f"attention {options.attention!r} with a cache of {options.cache_length} tokens does not go with target "
            f"{target.name}; a static cache and its length are for tensorrt alone"
        )
    check_genai_options(options)
    _check_kv_cache(options, target)
    check_prefill(options, target)
    if options.scheme is not None:
        for scheme in (options.scheme, *options.scheme.overrides.values()):
            _check_scheme(scheme, target)


def _check_kv_cache(options: OnnxOptions, target: Target) -> None:
    if options.kv_cache not in target.onnx.kv_cache:
        choices = ", ".join(target.onnx.kv_cache)
        raise BadInputError(
            f"target {target.name} has no {options.kv_cache} KV cache that was proven on its runtime; "
            f"choose --kv-cache {choices}"
        )
    if options.kv_cache != "same" and options.attention != "gqa":
        raise BadInputError(
            f"--kv-cache {options.kv_cache} needs --attention gqa: the standard operator has no quantized cache"
        )


def _check_scheme(scheme: QuantScheme, target: Target) -> None:
    refusal = target.quantization.refused_algorithms.get(scheme.algorithm)
    if refusal is not None:
        raise BadInputError(f"target {target.name} refuses {scheme.algorithm}: {refusal}")
    check_installed(algorithm(scheme.algorithm))
    if scheme.bits not in target.quantization.bits:
        reason = target.quantization.refused.get(str(scheme.bits), "its runtime has no kernel for them")
        taken = ", ".join(map(str, target.quantization.bits))
        raise BadInputError(f"target {target.name} refuses {scheme.bits}-bit weights: {reason}; choose {taken}")
    if target.quantization.symmetric_only and (not scheme.symmetric or algorithm(scheme.algorithm).codebook):
        raise BadInputError(f"target {target.name} takes no zero points and no codebooks, only symmetric integers")
    sizes = target.quantization.group_sizes.get(str(scheme.bits))
    if sizes is not None and scheme.group_size not in sizes:
        words = " or ".join("-1 (one scale per output row)" if s == PER_CHANNEL else str(s) for s in sizes)
        raise BadInputError(
            f"group size is {scheme.group_size}; {scheme.bits}-bit weights of target {target.name} take {words}"
        )


def plan_export(vlm: VLM, split: Split, target: Target, options: OnnxOptions) -> ExportPlan:
    """Decide for every parameter of `vlm` what the export does to it.

    Every parameter appears exactly once; an LM head tied to the embedding appears as a copy of its own. Raises
    `BadInputError` when the target refuses the options, when a group size does not divide a weight's input features
    (naming the first one) or when a ``keep`` pattern matches nothing, and `UnsupportedModelError` when a parameter
    belongs to no part or packed experts have no form.
    """
    check_options(options, target)
    check_kept(vlm.quantized, options.scheme, named=options.scheme_named)
    check_cross(vlm, split, options)
    _check_chunks(vlm, split, options)
    experts = plan_experts(vlm, split, target, options)
    if options.kv_cache == "int8" and not split.kv.uniform:
        raise BadInputError(
            f"--kv-cache int8: the layers of {vlm.facts.model_type} keep different things from token to token; "
            "choose --kv-cache same"
        )
    planner = _Planner(vlm, target, options, experts)
    owners = owned_parameters(vlm, split)
    check_keep_patterns(options.keep, [o.name for o in owners])
    weights = tuple(planner.plan(o) for o in owners)
    per_value = 1 if options.kv_cache == "int8" else _BYTES[NUMPY_DTYPES[planner.decoder_dtype]]
    plan = ExportPlan(
        vlm.facts.architecture,
        options,
        planner.encoder_dtype,
        planner.decoder_dtype,
        weights,
        0 if vlm.facts.output == "embeddings" else split.kv.bytes_per_token(per_value),
        state_bytes=split.kv.state_bytes(per_value),
    )
    if options.prefill == "same":
        return plan
    schemes = prompt_schemes(weights, head_weight_name(vlm))
    return dataclasses.replace(plan, prefill_bytes=prompt_bytes(plan.by_name, schemes))


def _check_chunks(vlm: VLM, split: Split, options: OnnxOptions) -> None:
    from vlmexport.split.chunks import refuse_chunks
    from vlmexport.split.decoder import DecoderPart

    for part in split.parts.values():
        if isinstance(part.module, DecoderPart):
            refuse_chunks(vlm.facts.model_type, part.module, options.attention)


def float_weights(vlm: VLM, split: Split, target: Target) -> tuple[WeightPlan, ...]:
    """Every weight as an unquantized export to `target` would store it, whether or not there is one of this model."""
    planner = _Planner(vlm, target, OnnxOptions(scheme=None))
    return tuple(planner.plan(owned) for owned in owned_parameters(vlm, split))


def check_keep_patterns(patterns: Iterable[str], names: list[str]) -> None:
    """Raise `BadInputError` for a ``--keep`` pattern that matches none of the weights `names`."""
    for pattern in patterns:
        if not any(matches_pattern(name, pattern) for name in names):
            raise BadInputError(f"--keep {pattern!r} matches no weight; `vlmexport plan onnx` lists their names")


def matches_pattern(weight: str, pattern: str) -> bool:
    """Does a ``--keep`` pattern (`fnmatch`) mean the weight, by its name or its module's?"""
    return fnmatchcase(weight, pattern) or fnmatchcase(weight.removesuffix(".weight"), pattern)


class _Planner:
    """The rules, with what they need to know of the model."""

    def __init__(self, vlm: VLM, target: Target, options: OnnxOptions, experts: PlannedExperts | None = None) -> None:
        self.options = options
        self._experts = experts or PlannedExperts()
        self.encoder_dtype: Dtype = options.encoder_dtype or target.onnx.encoder_storage
        self.decoder_dtype: Dtype = options.decoder_dtype or target.onnx.decoder_dtype
        self._linear = linear_weights(vlm)
        self._head = head_weight_name(vlm)
        self._tied = vlm.facts.tied_embeddings
        self._target = target
        self._kept = vlm.quantized
        self._float_bytes = {"float32": 4}.get(vlm.facts.dtype, 2)

    def plan(self, owned: OwnedParameter) -> WeightPlan:
        """The fate of one weight."""
        name, role, tensor = owned.name, owned.role, owned.tensor
        if not owned.used:
            return self._drop(owned)
        if role == "embed_tokens":
            return self._keep(name, role, tensor, "float16", "the embedding table is looked up, not multiplied")
        if role == "encoder":
            return self._keep(name, role, tensor, NUMPY_DTYPES[self.decoder_dtype], ONCE)
        if role != "decoder":
            reason = self._vision_reason(name)
            return self._keep(name, role, tensor, NUMPY_DTYPES[self.encoder_dtype], reason)
        scheme, reason = self._decoder_scheme(name, tensor)
        if scheme is None:
            wide_head = name == self._head and self.options.lm_head == "fp16"
            dtype = "float16" if wide_head else NUMPY_DTYPES[self.decoder_dtype]
            if name in self._experts.routers:
                dtype = "float32"  # a rounded score may choose another expert
            return self._keep(name, role, tensor, dtype, reason)
        stored, before = tuple(tensor.shape), self._bytes_before(name, tensor)
        shape = self._experts.shapes.get(name, stored)
        check_group_size(name, shape[-1], scheme)
        method, blocks = algorithm(scheme.algorithm), shape[-1] // block_size(shape[-1], scheme.group_size)
        scale_bytes = 4 if method.wide_scales else _BYTES[NUMPY_DTYPES[self.decoder_dtype]]
        after = quantized_bytes(shape, scheme, scale_bytes, blocks)
        dtype = method.stored_dtype(scheme.bits)
        return WeightPlan(name, role, stored, "quantize", dtype, reason, scheme, before, after)

    def _decoder_scheme(self, name: str, tensor: torch.Tensor) -> tuple[QuantScheme | None, str]:
        if tensor.ndim < 2:
            return None, "1-D: norm or bias"
        if name in self._experts.routers:
            return None, "router: it chooses among the experts"
        if name not in self._linear and name not in self._experts.shapes:
            return None, "not the weight of a linear layer"
        if name == self._head and self.options.lm_head == "fp16":
            return None, "--lm-head fp16"
        if self.options.scheme is None:
            return None, self._target.quantization.floats
        pattern = next((p for p in self.options.keep if matches_pattern(name, p)), None)
        if pattern is not None:
            return None, f"--keep {pattern}"
        if self._kept is not None:
            return self._kept_scheme(self._kept, name)
        reason = (
            "LM head" + (", a copy of the tied embedding" if self._tied else "")
            if name == self._head
            else ("packed experts" if name in self._experts.shapes else "decoder linear")
        )
        return self.options.scheme.for_weight(name), reason

    def _kept_scheme(self, kept: QuantizedCheckpoint, name: str) -> tuple[QuantScheme | None, str]:
        if name not in kept.formats:
            return None, f"unquantized in the {kept.method} checkpoint"
        try:
            scheme = kept_scheme(name, kept.formats[name], self.decoder_dtype)
            _check_scheme(scheme, self._target)
        except BadInputError as error:
            if self.options.requantize:
                words = kept.formats[name].words(per_channel=True)
                sizes = self._target.quantization.group_sizes
                return requantized_scheme(kept.formats[name], name, sizes), f"{_AGAIN}, it came {words}"
            raise BadInputError(
                f"the codes of the {kept.method} checkpoint cannot be kept: {error}, which needs the original weights; "
                f"{self._way_out()}"
            ) from error
        return scheme, f"codes kept from the {kept.method} checkpoint"

    def _way_out(self) -> str:
        """What to do with codes that the target cannot hold."""
        settings = self._target.quantization
        again = "or --requantize to round them again, " if settings.requantizes else ""
        return f"{again}or {settings.floats} for floats"

    def _vision_reason(self, name: str) -> str:
        if self._kept is not None and name in self._kept.formats:
            return "codes of the vision side are dequantized: it is never quantized unless asked"
        return "the vision side is never quantized unless asked"

    def _keep(self, name: str, role: str, tensor: torch.Tensor, dtype: str, reason: str) -> WeightPlan:
        after = tensor.numel() * _BYTES[dtype]
        before = self._bytes_before(name, tensor)
        return WeightPlan(name, role, tuple(tensor.shape), "keep", dtype, reason, None, before, after)

    def _drop(self, owned: OwnedParameter) -> WeightPlan:
        shape, before = tuple(owned.tensor.shape), self._bytes_before(owned.name, owned.tensor)
        dtype = str(owned.tensor.dtype).removeprefix("torch.")
        reason = "no image feature depends on it"
        return WeightPlan(owned.name, owned.role, shape, "drop", dtype, reason, None, before, 0)

    def _bytes_before(self, name: str, tensor: torch.Tensor) -> int:
        if name == self._head and self._tied:
            return 0
        if self._kept is None:
            return tensor.numel() * tensor.element_size()
        found = self._kept.formats.get(name)  # the model is in float32, the checkpoint is not
        return tensor.numel() * self._float_bytes if found is None else found.stored


def linear_weights(vlm: VLM) -> frozenset[str]:
    """Names of the weights of all linear layers of the model."""
    from torch import nn

    return frozenset(f"{n}.weight" for n, m in vlm.model.named_modules() if isinstance(m, nn.Linear))


def head_weight_name(vlm: VLM) -> str:
    """Name of the LM head's weight, under the head's own module also when it is tied."""
    from vlmexport.split.names import module_path

    head: Any = vlm.model.get_output_embeddings()
    return module_path(vlm.model, head) + ".weight"


def check_group_size(name: str, in_features: int, scheme: QuantScheme) -> None:
    """Raise `BadInputError` when the group size does not divide the weight's input features, with the choices."""
    group_size = scheme.group_size
    if group_size == PER_CHANNEL or in_features % group_size == 0:
        return
    taken = algorithm(scheme.algorithm).group_sizes or (16, 32, 64, 128, 256)
    sizes = [str(g) for g in taken if in_features % g == 0]
    choice = f"choose --group-size {' or '.join(sizes)}" if sizes else f"keep it with --keep '{name}'"
    raise BadInputError(f"{name} has {in_features} input features, not a multiple of group size {group_size}; {choice}")


def quantized_bytes(shape: tuple[int, ...], scheme: QuantScheme, scale_bytes: int, blocks: int | None = None) -> int:
    """Bytes of codes, scales and zero points of a weight ``[N, K]``, or of experts ``[E, N, K]``.

    `blocks` is the number of scales per row where the format repeats them (None: the scheme's groups).
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    groups = blocks or (1 if scheme.group_size == PER_CHANNEL else columns // scheme.group_size)
    codes = rows * columns * scheme.bits // 8
    zero_points = 0 if scheme.symmetric else rows * math.ceil(groups * scheme.bits / 8)
    return codes + rows * groups * scale_bytes + zero_points
