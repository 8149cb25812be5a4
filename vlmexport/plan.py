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

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.quantize.scheme import MAX_GROUP, MIN_GROUP, QuantScheme

if TYPE_CHECKING:
    import torch

    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split
    from vlmexport.target import Target

Action = Literal["quantize", "keep", "drop"]
Dtype = Literal["fp16", "fp32"]
NUMPY_DTYPES = {"fp16": "float16", "fp32": "float32"}
_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class OnnxOptions:
    """The choices of ``vlmexport onnx``; None means the target's default.

    `scheme` None keeps the decoder's weights at `decoder_dtype` (``--quant none``). `keep` are `fnmatch` patterns of
    weight names that stay unquantized.
    """

    target: str = "cpu"
    layout: str = "split"
    scheme: QuantScheme | None = field(default_factory=QuantScheme)
    encoder_dtype: Dtype | None = None
    decoder_dtype: Dtype | None = None
    lm_head: Literal["quantized", "fp16"] = "quantized"
    attention: Literal["gqa", "standard"] = "gqa"
    keep: tuple[str, ...] = ()


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
        return _layer_pattern(name) if len(self.weights) > 1 else name

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
    """Family x options x target, resolved per weight."""

    architecture: str
    options: OnnxOptions
    encoder_dtype: Dtype
    decoder_dtype: Dtype
    weights: tuple[WeightPlan, ...]

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

    def weight(self, name: str) -> WeightPlan:
        """The plan of one weight; KeyError when the plan does not know it (every weight must be planned)."""
        return self.by_name[name]

    def groups(self) -> tuple[WeightGroup, ...]:
        """The weights with repeated layers collapsed, in the order of first appearance."""
        found: dict[tuple[object, ...], list[WeightPlan]] = {}
        for w in self.weights:
            key = (_layer_pattern(w.name), w.part, w.shape, w.action, w.dtype, w.reason, str(w.scheme))
            found.setdefault(key, []).append(w)
        return tuple(WeightGroup(tuple(weights)) for weights in found.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**dataclasses.asdict(self), **totals}


def _layer_pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def check_options(options: OnnxOptions, target: Target) -> None:
    """Refuse what `target` cannot take, before a model is loaded.

    Raises `BadInputError` with the target's own reason.
    """
    if options.layout not in target.layouts:
        raise BadInputError(
            f"target {target.name} has no layout {options.layout!r}; it has {', '.join(target.layouts)}"
        )
    if options.scheme is not None:
        for scheme in (options.scheme, *options.scheme.overrides.values()):
            _check_scheme(scheme, target)


def _check_scheme(scheme: QuantScheme, target: Target) -> None:
    if scheme.bits not in target.quantization.bits:
        reason = target.quantization.refused.get(str(scheme.bits), "its runtime has no kernel for them")
        taken = ", ".join(map(str, target.quantization.bits))
        raise BadInputError(f"target {target.name} refuses {scheme.bits}-bit weights: {reason}; choose {taken}")
    if scheme.group_size == -1:
        raise BadInputError(
            f"target {target.name} takes groups of {MIN_GROUP} to {MAX_GROUP} input features, not one group per row"
        )


def plan_export(vlm: VLM, split: Split, target: Target, options: OnnxOptions) -> ExportPlan:
    """Decide for every parameter of `vlm` what the export does to it.

    Every parameter appears exactly once; an LM head tied to the embedding appears as a copy of its own. Raises
    `BadInputError` when the target refuses the options, when a group size does not divide a weight's input features
    (naming the first one) or when a ``keep`` pattern matches nothing, and `UnsupportedModelError` when a parameter
    belongs to no part.
    """
    check_options(options, target)
    planner = _Planner(vlm, target, options)
    owners = _owners(vlm, split)
    _check_keep_patterns(options.keep, [o.name for o in owners])
    weights = tuple(planner.plan(o) for o in owners)
    return ExportPlan(vlm.facts.architecture, options, planner.encoder_dtype, planner.decoder_dtype, weights)


@dataclass(frozen=True)
class _Owned:
    """One parameter and the part it goes to; `used` is False when no graph needs it."""

    name: str
    role: str
    tensor: torch.Tensor
    used: bool = True


def _owners(vlm: VLM, split: Split) -> list[_Owned]:
    """Every parameter in the order of the parts; the embedding claims its table before the decoder around it."""
    from vlmexport.split.names import weight_names
    from vlmexport.split.parts import Role
    from vlmexport.split.vision import part_parameter_names, unused_parameter_names

    everything = dict(vlm.model.named_parameters(remove_duplicate=False))
    vision, projector = split.parts[Role.VISION_ENCODER], split.parts[Role.PROJECTOR]
    claims: list[tuple[Role, Iterable[str], bool]] = [
        (Role.VISION_ENCODER, part_parameter_names(vision), True),
        (Role.VISION_ENCODER, unused_parameter_names(vlm, vision, projector), False),
        (Role.PROJECTOR, part_parameter_names(projector), True),
        (Role.EMBEDDING, weight_names(vlm.model, split.parts[Role.EMBEDDING].module), True),
        (Role.DECODER, weight_names(vlm.model, split.parts[Role.DECODER].module), True),
    ]
    owned: dict[str, _Owned] = {}
    for role, names, used in claims:
        for name in names:
            owned.setdefault(name, _Owned(name, str(role), everything[name], used))
    identities = {id(o.tensor) for o in owned.values()}
    lost = [name for name, parameter in everything.items() if id(parameter) not in identities]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: weights that belong to no part, so an export would lose them: {lost[0]}{more}"
        )
    return list(owned.values())


def _check_keep_patterns(patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise BadInputError(f"--keep {pattern!r} matches no weight; `vlmexport plan onnx` lists their names")


def _matches(weight: str, pattern: str) -> bool:
    return fnmatchcase(weight, pattern) or fnmatchcase(weight.removesuffix(".weight"), pattern)


class _Planner:
    """The rules, with what they need to know of the model."""

    def __init__(self, vlm: VLM, target: Target, options: OnnxOptions) -> None:
        self.options = options
        self.encoder_dtype: Dtype = options.encoder_dtype or target.onnx.encoder_storage
        self.decoder_dtype: Dtype = options.decoder_dtype or target.onnx.decoder_dtype
        self._linear = _linear_weights(vlm)
        self._head = _head_weight_name(vlm)
        self._tied = vlm.facts.tied_embeddings

    def plan(self, owned: _Owned) -> WeightPlan:
        """The fate of one weight."""
        name, role, tensor = owned.name, owned.role, owned.tensor
        if not owned.used:
            return self._drop(owned)
        if role == "embed_tokens":
            return self._keep(name, role, tensor, "float16", "the embedding table is looked up, not multiplied")
        if role != "decoder":
            reason = "the vision side is never quantized unless asked"
            return self._keep(name, role, tensor, NUMPY_DTYPES[self.encoder_dtype], reason)
        scheme, reason = self._decoder_scheme(name, tensor)
        if scheme is None:
            wide_head = name == self._head and self.options.lm_head == "fp16"
            dtype = "float16" if wide_head else NUMPY_DTYPES[self.decoder_dtype]
            return self._keep(name, role, tensor, dtype, reason)
        _check_group_size(name, tensor.shape[-1], scheme.group_size)
        after = _quantized_bytes(tuple(tensor.shape), scheme, _BYTES[NUMPY_DTYPES[self.decoder_dtype]])
        shape, before = tuple(tensor.shape), self._bytes_before(name, tensor)
        return WeightPlan(name, role, shape, "quantize", f"int{scheme.bits}", reason, scheme, before, after)

    def _decoder_scheme(self, name: str, tensor: torch.Tensor) -> tuple[QuantScheme | None, str]:
        if tensor.ndim < 2:
            return None, "1-D: norm or bias"
        if name not in self._linear:
            return None, "not the weight of a linear layer"
        if name == self._head and self.options.lm_head == "fp16":
            return None, "--lm-head fp16"
        if self.options.scheme is None:
            return None, "--quant none"
        pattern = next((p for p in self.options.keep if _matches(name, p)), None)
        if pattern is not None:
            return None, f"--keep {pattern}"
        reason = (
            "LM head" + (", a copy of the tied embedding" if self._tied else "")
            if name == self._head
            else "decoder linear"
        )
        return _scheme_of(name, self.options.scheme), reason

    def _keep(self, name: str, role: str, tensor: torch.Tensor, dtype: str, reason: str) -> WeightPlan:
        after = tensor.numel() * _BYTES[dtype]
        before = self._bytes_before(name, tensor)
        return WeightPlan(name, role, tuple(tensor.shape), "keep", dtype, reason, None, before, after)

    def _drop(self, owned: _Owned) -> WeightPlan:
        shape, before = tuple(owned.tensor.shape), self._bytes_before(owned.name, owned.tensor)
        dtype = str(owned.tensor.dtype).removeprefix("torch.")
        reason = "no image feature depends on it"
        return WeightPlan(owned.name, owned.role, shape, "drop", dtype, reason, None, before, 0)

    def _bytes_before(self, name: str, tensor: torch.Tensor) -> int:
        return 0 if name == self._head and self._tied else tensor.numel() * tensor.element_size()


def _linear_weights(vlm: VLM) -> frozenset[str]:
    from torch import nn

    return frozenset(f"{n}.weight" for n, m in vlm.model.named_modules() if isinstance(m, nn.Linear))


def _head_weight_name(vlm: VLM) -> str:
    from vlmexport.split.names import module_path

    head: Any = vlm.model.get_output_embeddings()
    return module_path(vlm.model, head) + ".weight"


def _scheme_of(name: str, scheme: QuantScheme) -> QuantScheme:
    for pattern, override in scheme.overrides.items():
        if _matches(name, pattern):
            return override
    return dataclasses.replace(scheme, overrides={})


def _check_group_size(name: str, in_features: int, group_size: int) -> None:
    if in_features % group_size == 0:
        return
    sizes = [str(g) for g in (16, 32, 64, 128, 256) if in_features % g == 0]
    choice = f"choose --group-size {' or '.join(sizes)}" if sizes else f"keep it with --keep '{name}'"
    raise BadInputError(f"{name} has {in_features} input features, not a multiple of group size {group_size}; {choice}")


def _quantized_bytes(shape: tuple[int, ...], scheme: QuantScheme, scale_bytes: int) -> int:
    rows, columns = shape
    groups = columns // scheme.group_size
    codes = rows * columns * scheme.bits // 8
    zero_points = 0 if scheme.symmetric else rows * math.ceil(groups * scheme.bits / 8)
    return codes + rows * groups * scale_bytes + zero_points
