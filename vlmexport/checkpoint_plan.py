"""`CheckpointPlan`: what writing a Hugging Face checkpoint will do to every weight, decided before any work is done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlmexport.checkpoint_conversion import check_conversion, conversion_schemes, most_common_scheme
from vlmexport.errors import BadInputError
from vlmexport.owners import OwnedParameter, owned_parameters
from vlmexport.plan import (
    WeightPlan,
    check_group_size,
    check_keep_patterns,
    head_weight_name,
    layer_pattern,
    linear_weights,
    matches_pattern,
    quantized_bytes,
)
from vlmexport.plan_file import AutoLimit, QuantPlan
from vlmexport.quantize.registry import ALGORITHMS, IMPORTED
from vlmexport.quantize.scheme import QuantScheme

if TYPE_CHECKING:
    from vlmexport.model.importers.packed import QuantizedCheckpoint
    from vlmexport.model.load import VLM
    from vlmexport.split.experts import Experts
    from vlmexport.split.parts import Split


@dataclass(frozen=True)
class CheckpointFormat:
    """A checkpoint format: the algorithms and bits whose codes it holds, and what ``--quant`` is when not given.

    `mixed` formats hold different bits in different layers. `scale_bytes` is the size of one stored scale;
    `half_scales` ones are float16 whatever was chosen. Integer codes that come with a checkpoint are described by the
    algorithm `imported` (empty: it holds none); `decoder_only` formats name no other layers than the decoder's.
    `no_experts` says why the format cannot hold experts that are packed in one parameter (empty: it can), and
    `no_asymmetric_experts` why not those with zero points.
    """

    name: str
    summary: str
    algorithms: tuple[str, ...]
    bits: tuple[int, ...]
    default_quant: str
    mixed: bool = False
    scale_bytes: int = 2
    half_scales: bool = False
    imported: str = ""
    decoder_only: bool = False
    no_experts: str = ""
    no_asymmetric_experts: str = ""


_INTEGER = ("awq+gptq", "awq", "gptq", "hqq", "rtn")
FORMATS: dict[str, CheckpointFormat] = {
    f.name: f
    for f in (
        CheckpointFormat(
            "compressed-tensors", "integers of 2 to 8 bits, FP8 and W8A8; vLLM and transformers",
            (*_INTEGER, "fp8", "smoothquant"), (2, 3, 4, 8), _INTEGER[0], mixed=True, imported=IMPORTED,
            no_asymmetric_experts="transformers and vLLM read no zero points of experts; take a symmetric scheme",
        ),
        CheckpointFormat(
            "gptq", "GPTQ's layout; vLLM and gptqmodel", _INTEGER, (2, 3, 4, 8), _INTEGER[0],
            half_scales=True, imported=IMPORTED, decoder_only=True,
        ),
        CheckpointFormat(
            "awq", "AWQ's GEMM layout; vLLM and gptqmodel", _INTEGER, (4,), _INTEGER[0],
            half_scales=True, imported=IMPORTED, decoder_only=True,
        ),
        CheckpointFormat(
            "bnb-nf4", "bitsandbytes NF4; transformers and vLLM", ("nf4", "nf4:nested"), (4,), "nf4", scale_bytes=4,
            no_experts="its loaders put NF4 weights into linear layers only",
        ),
        CheckpointFormat(
            "torchao", "torchao tensors; transformers",
            tuple(name for name in ALGORITHMS if name.startswith("torchao:")), (2, 3, 4, 8), "torchao:int4wo",
            imported="torchao:intx", no_experts="transformers puts torchao's tensors into linear layers only",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointOptions:
    """The choices of ``vlmexport quantize``: a format, a scheme and `fnmatch` patterns of weights to leave alone.

    `scheme_named` says that the user asked for `scheme`: it is no default then that gives way to the codes of a
    quantized checkpoint. `choice` is what ``--quant auto`` has to meet (starting from `scheme`) or a plan file; it must
    be settled (`vlmexport.calibrate.auto.settle_choice`) before anything is planned.
    """

    format: str
    scheme: QuantScheme
    keep: tuple[str, ...] = ()
    scheme_named: bool = False
    choice: AutoLimit | QuantPlan | None = None


@dataclass(frozen=True)
class CheckpointPlan:
    """Model x options, resolved per weight; `unquantized_linears` are the modules a loader must leave as they are.

    `kept_from` is the method of a checkpoint that came quantized, whose codes are kept; empty for float weights.
    """

    architecture: str
    options: CheckpointOptions
    weights: tuple[WeightPlan, ...]
    unquantized_linears: tuple[str, ...]
    kept_from: str = ""

    @cached_property
    def schemes(self) -> dict[str, QuantScheme]:
        """The schemes of the weights to be quantized, by name in the model."""
        return {w.name: w.scheme for w in self.weights if w.scheme is not None}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        before, after = sum(w.bytes_before for w in self.weights), sum(w.bytes_after for w in self.weights)
        return {**dataclasses.asdict(self), "bytes_before": before, "bytes_after": after}


def checkpoint_format(name: str) -> CheckpointFormat:
    """The format `name`; raises `BadInputError` listing the choices."""
    if name not in FORMATS:
        raise BadInputError(f"checkpoint format {name!r} is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_checkpoint_options(options: CheckpointOptions) -> None:
    """Refuse what the format cannot hold, before a model is loaded; raises `BadInputError` with what it takes."""
    kind = checkpoint_format(options.format)
    if isinstance(options.choice, AutoLimit) and not kind.mixed:
        raise BadInputError(
            f"--format {kind.name} holds one scheme for all layers, so --quant auto has nothing to choose; "
            f"{_mixed_formats()} holds several"
        )
    for scheme in (options.scheme, *options.scheme.overrides.values()):
        if scheme.algorithm not in kind.algorithms:
            raise BadInputError(
                f"--format {kind.name} takes --quant {', '.join(kind.algorithms)}, not {scheme.algorithm}"
            )
        if scheme.bits not in kind.bits:
            taken = ", ".join(map(str, kind.bits))
            raise BadInputError(
                f"--format {kind.name} holds {taken} bits, not {scheme.bits}; compressed-tensors holds more"
            )
    _check_mixture(kind, options.scheme)


def _check_mixture(kind: CheckpointFormat, scheme: QuantScheme) -> None:
    shapes = {(s.algorithm, s.bits, s.group_size, s.symmetric) for s in (scheme, *scheme.overrides.values())}
    if len(shapes) > 1 and not kind.mixed:
        raise BadInputError(f"--format {kind.name} holds one scheme for all layers; {_mixed_formats()} holds several")


def _mixed_formats() -> str:
    return ", ".join(name for name, f in FORMATS.items() if f.mixed)


def plan_checkpoint(vlm: VLM, split: Split, options: CheckpointOptions) -> CheckpointPlan:
    """Decide for every parameter of `vlm` what the checkpoint does to it: the decoder's linear layers are quantized.

    The vision side, the projector, the embedding and the LM head stay as they are. A model that came quantized keeps
    its codes, wherever they are. Raises `BadInputError` when the format does not hold the scheme or the codes, a group
    size does not divide a weight's input features, or a ``keep`` pattern matches nothing. Packed experts are quantized
    one by one, and their routers are not.
    """
    from vlmexport.split.experts import find_experts
    from vlmexport.split.parts import Role

    check_checkpoint_options(options)
    owners = owned_parameters(vlm, split)
    linears, head = linear_weights(vlm), head_weight_name(vlm)
    experts = find_experts(vlm.model, split.parts[Role.DECODER])
    if vlm.quantized is None:
        check_keep_patterns(options.keep, [o.name for o in owners])
        decide: _Decide = functools.partial(_decide, options=options, linears=linears, head=head, experts=experts)
    else:
        options, schemes = _conversion(vlm.quantized, owners, options, linears, head)
        decide = functools.partial(_decide_kept, schemes=schemes, method=vlm.quantized.method)
    tied = vlm.facts.tied_embeddings
    weights = tuple(_plan(vlm, o, decide(o), options) for o in owners if not (tied and o.name == head))
    quantized = {w.name for w in weights if w.scheme is not None}
    products = linears | experts.packed | experts.other | experts.routers
    left = tuple(sorted(name.removesuffix(".weight") for name in products - quantized))
    method = "" if vlm.quantized is None else vlm.quantized.method
    return CheckpointPlan(vlm.facts.architecture, options, weights, left, method)


# The scheme of a weight (None: it stays as it is), and the reason.
_Decide = Callable[[OwnedParameter], tuple[QuantScheme | None, str]]


def _decide(
    owned: OwnedParameter, options: CheckpointOptions, linears: frozenset[str], head: str, experts: Experts
) -> tuple[QuantScheme | None, str]:
    reason = _reason_to_keep(owned, options, linears, head, experts)
    if reason:
        return None, reason
    scheme = options.scheme.for_weight(owned.name)
    if owned.name not in experts.packed:
        return scheme, "decoder linear"
    _check_experts(owned.name, scheme, checkpoint_format(options.format))
    return scheme, "packed experts"


def _check_experts(name: str, scheme: QuantScheme, kind: CheckpointFormat) -> None:
    refusal = kind.no_experts or ("" if scheme.symmetric else kind.no_asymmetric_experts)
    if refusal:
        around = layer_pattern(name).rpartition(".")[0]
        raise BadInputError(
            f"{name} holds packed experts, and --format {kind.name} cannot hold them so: {refusal}; or leave them "
            f"alone with --keep '{around}.*'"
        )


def _decide_kept(owned: OwnedParameter, schemes: dict[str, QuantScheme], method: str) -> tuple[QuantScheme | None, str]:
    scheme = schemes.get(owned.name)
    return scheme, f"{'unquantized in' if scheme is None else 'codes kept from'} the {method} checkpoint"


def _conversion(
    kept: QuantizedCheckpoint,
    owners: list[OwnedParameter],
    options: CheckpointOptions,
    linears: frozenset[str],
    head: str,
) -> tuple[CheckpointOptions, dict[str, QuantScheme]]:
    """The options with the scheme of the codes that came with the checkpoint, and each weight's own."""
    kind = checkpoint_format(options.format)
    check_conversion(kept, kind, options)
    outside = {o.name for o in owners if o.role != "decoder"} | {head}
    schemes = conversion_schemes(kept, kind, linears, outside)
    return dataclasses.replace(options, scheme=most_common_scheme(schemes)), schemes


def _plan(
    vlm: VLM, owned: OwnedParameter, decided: tuple[QuantScheme | None, str], options: CheckpointOptions
) -> WeightPlan:
    (scheme, reason), name, shape = decided, owned.name, tuple(owned.tensor.shape)
    before = _stored_bytes(vlm, owned)
    if scheme is None:
        own = str(owned.tensor.dtype).removeprefix("torch.")
        dtype = own if vlm.quantized is None else vlm.facts.dtype
        return WeightPlan(name, owned.role, shape, "keep", dtype, reason, None, before, before)
    check_group_size(name, shape[-1], scheme)
    after = quantized_bytes(shape, scheme, checkpoint_format(options.format).scale_bytes)
    return WeightPlan(name, owned.role, shape, "quantize", _dtype(scheme), reason, scheme, before, after)


def _stored_bytes(vlm: VLM, owned: OwnedParameter) -> int:
    if vlm.quantized is None:
        return owned.tensor.numel() * owned.tensor.element_size()
    codes = vlm.quantized.formats.get(owned.name)  # the model is in float32, the checkpoint is not
    return owned.tensor.numel() * (4 if vlm.facts.dtype == "float32" else 2) if codes is None else codes.stored


def _reason_to_keep(
    owned: OwnedParameter, options: CheckpointOptions, linears: frozenset[str], head: str, experts: Experts
) -> str:
    """Why a weight stays as it is; empty when it is quantized."""
    if owned.role == "embed_tokens":
        return "the embedding table is looked up, not multiplied"
    if owned.role != "decoder":
        return "the vision side is never quantized unless asked"
    if owned.tensor.ndim < 2:
        return "1-D: norm or bias"
    if owned.name == head:
        return "LM head"
    if owned.name in experts.routers:
        return "router: it chooses among the experts"
    if owned.name in experts.other:
        return "three axes, but no expert is multiplied as [outputs, inputs]"
    if owned.name not in linears | experts.packed:
        return "not the weight of a linear layer"
    pattern = next((p for p in options.keep if matches_pattern(owned.name, p)), None)
    return "" if pattern is None else f"--keep {pattern}"


def _dtype(scheme: QuantScheme) -> str:
    named = {"nf4": "nf4", "nf4:nested": "nf4", "fp8": "float8_e4m3fn"}
    return named.get(scheme.algorithm, f"int{scheme.bits}")


def group_by_scheme(schemes: dict[str, QuantScheme]) -> dict[QuantKey, list[str]]:
    """Weight names by what a loader must know of their scheme, most common first."""
    found: dict[QuantKey, list[str]] = {}
    for name, scheme in schemes.items():
        found.setdefault(QuantKey.of(scheme), []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


@dataclass(frozen=True)
class QuantKey:
    """What a loader must know of a scheme: the kind of numbers (``int``, ``fp8``, ``w8a8``, ...) and their layout."""

    kind: str
    bits: int
    group_size: int
    symmetric: bool

    @staticmethod
    def of(scheme: QuantScheme) -> QuantKey:
        """The key of `scheme`: the integer algorithms differ in how codes are chosen, not in what is stored."""
        kind = "int" if scheme.algorithm in (*_INTEGER, IMPORTED) else scheme.algorithm
        return QuantKey(kind, scheme.bits, scheme.group_size, scheme.symmetric)
