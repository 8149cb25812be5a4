"""compressed-tensors: ``pack-quantized`` integers, ``float-quantized`` FP8 and ``int-quantized`` W8A8.

Follows the layouts of compressed-tensors 0.20 (`compressors/pack_quantized`, `naive_quantized`), which vLLM reads too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.checkpoint_plan import QuantKey, group_by_scheme
from vlmexport.lower.checkpoint.bits import pack_words
from vlmexport.lower.checkpoint.layout import Layout, Subject, zero_points
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

_FORMATS = {"int": "pack-quantized", "fp8": "float-quantized", "smoothquant": "int-quantized"}


def layout(subject: Subject) -> Layout:
    """The compressed-tensors layout for `subject`."""
    return CompressedTensors(subject)


@dataclass(frozen=True)
class CompressedTensors:
    """See the module; one config group per distinct scheme."""

    subject: Subject

    def pack(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
        """``weight_packed``, ``weight_scale``, ``weight_shape`` and ``weight_zero_point``, or weight and scale."""
        kind = QuantKey.of(scheme).kind
        if kind == "fp8":
            return {"weight": _float8(tensor), "weight_scale": tensor.scale}
        if kind == "smoothquant":
            centred = tensor.codes.to(torch.int16) - zero_points(tensor)[:, :1].to(torch.int16)
            return {"weight": centred.to(torch.int8), "weight_scale": tensor.scale}
        packed = {
            "weight_packed": pack_words(tensor.codes, tensor.bits),
            "weight_scale": tensor.scale,
            "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            # Packed along the output rows: int32 [N * bits / 32, K / g].
            packed["weight_zero_point"] = pack_words(zero_points(tensor).t(), tensor.bits).t()
        return packed

    def config(self) -> dict[str, Any]:
        """Config groups, format, and every module to ignore by name."""
        groups = group_by_scheme(self.subject.plan.schemes)
        single = len(groups) == 1
        formats = sorted({_FORMATS[key.kind] for key in groups})
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "config_groups": {
                f"group_{index}": _group(
                    key, ["Linear"] if single else self.subject.names.modules(weights), self._activations(key)
                )
                for index, (key, weights) in enumerate(groups.items())
            },
            "ignore": self.subject.untouched_modules(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({} if all(key.symmetric for key in groups) and not self._has_experts() else _DEQUANTIZE),
        }

    def _activations(self, key: QuantKey) -> dict[str, Any] | None:
        """How inputs are quantized; not at all where only the codes came with a checkpoint (decision 0030)."""
        if key.kind == "int" or self.subject.plan.kept_from:
            return None
        return {**_PER_TOKEN, "type": "float" if key.kind == "fp8" else "int"}

    def _has_experts(self) -> bool:
        return any(place.weight in self.subject.plan.schemes for place in self.subject.names.experts.values())

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


def _float8(tensor: QuantizedTensor) -> torch.Tensor:
    """The codes as E4M3 numbers; exact, since the codebook's levels are E4M3 numbers."""
    if tensor.codebook is None:
        raise ValueError("FP8 codes need their codebook")
    return tensor.codebook[tensor.codes.long()].to(torch.float8_e4m3fn)


def _group(key: QuantKey, targets: list[str], activations: dict[str, Any] | None) -> dict[str, Any]:
    per_channel = key.group_size == PER_CHANNEL
    weights = {
        "num_bits": key.bits,
        "type": "float" if key.kind == "fp8" else "int",
        "symmetric": key.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else key.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _FORMATS[key.kind],
    }


# transformers 5.23 with compressed-tensors 0.20 has no room for packed zero points in the modules that it makes before
# loading, and none for packed experts: it takes both only when told to dequantize them at once. Other readers ignore
# it.
_DEQUANTIZE = {"dequantize": True}
_PER_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
