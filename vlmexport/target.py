"""`Target`: a runtime or device profile, parsed from one TOML file and checked."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.types import GGML_TYPES
from vlmexport.quantize.registry import ALGORITHMS

TARGET_VERSION = 1
Dtype = Literal["fp16", "fp32"]


@dataclass(frozen=True)
class OnnxSettings:
    """How graphs are written for this target: opset, precision of the decoder and the encoder, MatMulNBits level.

    `dialect`: ``ort`` writes ONNX Runtime's own operators, ``tensorrt`` standard ones that NVIDIA's parser takes, with
    a static KV cache. `kv_cache`: what ``--kv-cache`` may be; ``int8`` only where the runtime's quantized cache was
    proven. `prefill`: what ``--prefill`` may be; ``int8`` for CPUs.
    """

    dialect: Literal["ort", "tensorrt"]
    opset: int
    accuracy_level: int
    decoder_dtype: Dtype
    encoder_storage: Dtype
    encoder_arithmetic: Dtype
    kv_cache: tuple[str, ...]
    prefill: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationSettings:
    """Bit widths the runtime takes; the reason for each that it refuses, and for each algorithm (by its name).

    `symmetric_only`: it takes no zero points and no codebooks. `group_sizes` by bits (-1: one scale per output row),
    the usual one first; a width that is not there takes any. `floats` is the option that leaves weights unquantized.
    `requantizes`: codes of a quantized checkpoint that it cannot hold may be rounded again (``--requantize``).
    """

    bits: tuple[int, ...]
    refused: dict[str, str]
    refused_algorithms: dict[str, str]
    symmetric_only: bool = False
    group_sizes: dict[str, list[int]] = field(default_factory=dict)
    floats: str = "--quant none"
    requantizes: bool = False


@dataclass(frozen=True)
class LossLimits:
    """What quantization may cost, in any runtime.

    ``quantization_kl`` in mean nats per token; ``quantization_top1`` a share of tokens; ``perplexity_ratio`` quantized
    over original; ``accuracy_drop`` a difference of shares.
    """

    quantization_kl: float
    quantization_top1: float
    perplexity_ratio: float
    accuracy_drop: float


@dataclass(frozen=True)
class ParityLimits(LossLimits):
    """The gate's limits for ONNX graphs.

    ``*_rel`` are largest absolute difference over largest absolute reference value (``lowering_exact_rel_fp16`` is for
    decoders with float16 activations; ``merged_rel`` for pixels to decoder input); ``*_kl`` mean nats per token.
    ``lowering_exact_kl`` is judged for targets that have it.
    """

    lowering_exact_rel: float
    lowering_exact_rel_fp16: float
    lowering_shipped_kl: float
    vision_rel: float
    projector_rel: float
    embedding_rel: float
    merged_rel: float
    lowering_exact_kl: float | None = None


@dataclass(frozen=True)
class GgufLimits(LossLimits):
    """The gate's limits for GGUF files.

    ``*_rel`` and ``*_kl`` as in `ParityLimits` (``lowering_kl`` with an F32 cache and no flash attention,
    ``lowering_shipped_kl`` as llama.cpp's own tools run; ``image_prepared_rel`` where both sides may resize a picture
    to slightly other pixels); those that end in ``_rounded`` are for files with
    tensors whose products llama.cpp makes with rounded activations (every type but F32 and F16). `weights`: by tensor
    type, the relative RMS error that rounding may leave in a whole tensor and in its worst block; `weights_importance`
    where an importance matrix gave up columns that matter little.
    """

    image_embedding_rel: float
    image_embedding_rel_rounded: float
    image_prepared_rel: float
    image_prepared_rel_rounded: float
    lowering_kl: float
    lowering_kl_rounded: float
    lowering_shipped_kl: float
    lowering_shipped_kl_rounded: float
    weights: dict[str, tuple[float, float]]
    weights_importance: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Target:
    """A parsed profile; see ``targets/*.toml``.

    `onnx_settings` is None and `limits` are `GgufLimits` where the runtime reads no ONNX graphs.
    """

    name: str
    runtime: str
    provider: str
    description: str
    layouts: tuple[str, ...]
    onnx_settings: OnnxSettings | None
    quantization: QuantizationSettings
    limits: ParityLimits | GgufLimits

    @property
    def onnx(self) -> OnnxSettings:
        """How graphs are written; raises `BadInputError` for a target that takes none."""
        if self.onnx_settings is None:
            raise BadInputError(
                f"target {self.name} takes no ONNX graphs; choose one of {_listed(onnx_target_names())}"
            )
        return self.onnx_settings

    @property
    def parity(self) -> ParityLimits:
        """The limits of the gate for ONNX graphs; raises `BadInputError` for a target that takes none."""
        if not isinstance(self.limits, ParityLimits):
            raise BadInputError(f"target {self.name} has no limits for ONNX graphs")
        return self.limits

    @property
    def gguf_parity(self) -> GgufLimits:
        """The limits of the gate for GGUF files; raises `BadInputError` for a target that takes none."""
        if not isinstance(self.limits, GgufLimits):
            raise BadInputError(f"target {self.name} has no limits for GGUF files; the target for them is llamacpp")
        return self.limits


def target_names() -> list[str]:
    """Names of the profiles that ship with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def onnx_target_names() -> list[str]:
    """Names of the shipped profiles for ONNX Runtime: the choices of ``vlmexport onnx --target``."""
    return [name for name in target_names() if _read(name)["runtime"] == "onnxruntime"]


def load_target(name: str) -> Target:
    """Read the profile `name`; raises `BadInputError` when it does not exist or has unknown or missing keys."""
    if name not in target_names():
        raise BadInputError(f"target {name!r} is unknown; choose one of {_listed(target_names())}")
    return parse_target(_read(name), name)


def parse_target(data: dict[str, Any], origin: str) -> Target:
    """Check a profile's data strictly; `origin` names it in errors."""
    data = dict(data)
    if data.pop("version", None) != TARGET_VERSION:
        raise BadInputError(f"target {origin}: version must be {TARGET_VERSION}")
    onnx, parity = data.pop("onnx", None), data.pop("parity", {})
    data["onnx_settings"] = None if onnx is None else _build(OnnxSettings, onnx, f"{origin}.onnx")
    data["quantization"] = _build(QuantizationSettings, data.get("quantization", {}), f"{origin}.quantization")
    if onnx is None:
        tables = ("weights", "weights_importance")
        parity = {**parity, **{t: _weight_limits(parity.get(t), f"{origin}.parity.{t}") for t in tables}}
    data["limits"] = _build(GgufLimits if onnx is None else ParityLimits, parity, f"{origin}.parity")
    _check_refusals(data["quantization"], origin)
    target: Target = _build(Target, data, origin)
    return target


def _build(kind: type[Any], data: dict[str, Any], origin: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    absent = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(kind) if f.default is absent and f.default_factory is absent}
    missing, unknown = sorted(needed - data.keys()), sorted(data.keys() - known)
    if missing or unknown:
        raise BadInputError(f"target {origin}: missing keys {missing}, unknown keys {unknown}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _weight_limits(table: Any, origin: str) -> dict[str, tuple[float, float]]:
    """Two numbers for every ggml type; raises `BadInputError` for a type that is missing or unknown."""
    found = table if isinstance(table, dict) else {}
    missing, unknown = sorted(GGML_TYPES.keys() - found.keys()), sorted(found.keys() - GGML_TYPES.keys())
    if missing or unknown:
        raise BadInputError(f"target {origin}: missing types {missing}, unknown types {unknown}")
    odd = sorted(name for name, pair in found.items() if not isinstance(pair, list) or len(pair) != 2)
    if odd:
        raise BadInputError(
            f"target {origin}: {', '.join(odd)} must be two numbers, of a tensor and of its worst block"
        )
    return {name: (float(pair[0]), float(pair[1])) for name, pair in found.items()}


def _check_refusals(settings: QuantizationSettings, origin: str) -> None:
    for table in (settings.refused, settings.refused_algorithms):
        silent = sorted(name for name, reason in table.items() if not isinstance(reason, str) or not reason)
        if silent:
            raise BadInputError(f"target {origin}.quantization: {', '.join(silent)} is refused without a reason")
    unknown = sorted(settings.refused_algorithms.keys() - ALGORITHMS.keys())
    if unknown:
        raise BadInputError(f"target {origin}.quantization.refused_algorithms: {', '.join(unknown)} is no algorithm")


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _folder() -> Any:
    try:
        return resources.files("vlmexport.targets")
    except ModuleNotFoundError as error:
        raise BadInputError("the target profiles are not installed; run `pip install -e .`") from error
