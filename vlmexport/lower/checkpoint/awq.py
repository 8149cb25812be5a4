"""AWQ's GEMM layout: 4-bit words along the output features, nibbles in the order of its CUDA kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.lower.checkpoint.bits import pack_words
from vlmexport.lower.checkpoint.layout import Layout, Subject, check_packable, zero_points
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

# Which of eight neighbouring outputs is in nibble 0, 1, ... of a word.
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def layout(subject: Subject) -> Layout:
    """The AWQ layout for `subject`."""
    return Awq(subject)


@dataclass(frozen=True)
class Awq:
    """See the module; symmetric weights get zero points of 8, since the format always has them."""

    subject: Subject

    def pack(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
        """``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[K / g, N / 8]``, ``scales`` ``[K / g, N]``."""
        check_packable(name, tensor.shape[0], "output", len(_NIBBLES), "AWQ", scheme)
        return {
            "qweight": pack_words(_reordered(tensor.codes.t()), tensor.bits),
            "qzeros": pack_words(_reordered(zero_points(tensor).t()), tensor.bits),
            "scales": tensor.scale.t(),
        }

    def config(self) -> dict[str, Any]:
        """The keys of autoawq, vLLM and transformers' `AwqConfig`."""
        scheme = self.subject.plan.options.scheme
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "modules_to_not_convert": self.subject.untouched_modules(),
        }

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


def _reordered(values: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    return values.reshape(rows, columns // len(_NIBBLES), len(_NIBBLES))[:, :, list(_NIBBLES)].reshape(rows, columns)
