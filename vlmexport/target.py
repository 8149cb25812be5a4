"""`Target`: a runtime or device profile, parsed from one TOML file and checked."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import ALGORITHMS

TARGET_VERSION = 1
Dtype = Literal["fp16", "fp32"]


@dataclass(frozen=True)
class OnnxSettings:
    """How graphs are written for this target: opset, precision of the decoder and the encoder, MatMulNBits level.

    `kv_cache`: what ``--kv-cache`` may be; ``int8`` only where the runtime's quantized cache was proven. `prefill`:
    what ``--prefill`` may be; ``int8`` for CPUs.
    """

    opset: int
    accuracy_level: int
    decoder_dtype: Dtype
    encoder_storage: Dtype
    encoder_arithmetic: Dtype
    kv_cache: tuple[str, ...]
    prefill: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationSettings:
    """Bit widths the runtime takes; the reason for each that it refuses, and for each algorithm (by its name)."""

    bits: tuple[int, ...]
    refused: dict[str, str]
    refused_algorithms: dict[str, str]


@dataclass(frozen=True)
class ParityLimits:
    """The gate's limits.

    ``*_rel`` are largest absolute difference over largest absolute reference value (``lowering_exact_rel_fp16`` is for
    decoders with float16 activations; ``merged_rel`` for pixels to decoder input); ``*_kl`` mean nats per token;
    ``quantization_top1`` a share of tokens; ``perplexity_ratio`` quantized over original; ``accuracy_drop`` a
    difference of shares.
    """

    lowering_exact_rel: float
    lowering_exact_rel_fp16: float
    lowering_shipped_kl: float
    vision_rel: float
    projector_rel: float
    embedding_rel: float
    merged_rel: float
    quantization_kl: float
    quantization_top1: float
    perplexity_ratio: float
    accuracy_drop: float


@dataclass(frozen=True)
class Target:
    """A parsed profile; see ``targets/*.toml``."""

    name: str
    runtime: str
    provider: str
    description: str
    layouts: tuple[str, ...]
    onnx: OnnxSettings
    quantization: QuantizationSettings
    parity: ParityLimits


def target_names() -> list[str]:
    """Names of the profiles that ship with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def load_target(name: str) -> Target:
    """Read the profile `name`; raises `BadInputError` when it does not exist or has unknown or missing keys."""
    if name not in target_names():
        raise BadInputError(f"target {name!r} is unknown; choose one of {', '.join(target_names())}")
    return parse_target(tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8")), name)


def parse_target(data: dict[str, Any], origin: str) -> Target:
    """Check a profile's data strictly; `origin` names it in errors."""
    data = dict(data)
    if data.pop("version", None) != TARGET_VERSION:
        raise BadInputError(f"target {origin}: version must be {TARGET_VERSION}")
    for key, kind in (("onnx", OnnxSettings), ("quantization", QuantizationSettings), ("parity", ParityLimits)):
        data[key] = _build(kind, data.get(key, {}), f"{origin}.{key}")
    _check_refusals(data["quantization"], origin)
    target: Target = _build(Target, data, origin)
    return target


def _build(kind: type[Any], data: dict[str, Any], origin: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    missing, unknown = sorted(known - data.keys()), sorted(data.keys() - known)
    if missing or unknown:
        raise BadInputError(f"target {origin}: missing keys {missing}, unknown keys {unknown}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _check_refusals(settings: QuantizationSettings, origin: str) -> None:
    for table in (settings.refused, settings.refused_algorithms):
        silent = sorted(name for name, reason in table.items() if not isinstance(reason, str) or not reason)
        if silent:
            raise BadInputError(f"target {origin}.quantization: {', '.join(silent)} is refused without a reason")
    unknown = sorted(settings.refused_algorithms.keys() - ALGORITHMS.keys())
    if unknown:
        raise BadInputError(f"target {origin}.quantization.refused_algorithms: {', '.join(unknown)} is no algorithm")


def _folder() -> Any:
    try:
        return resources.files("vlmexport.targets")
    except ModuleNotFoundError as error:
        raise BadInputError("the target profiles are not installed; run `pip install -e .`") from error
