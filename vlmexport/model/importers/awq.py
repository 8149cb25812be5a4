"""AWQ checkpoints of the GEMM layout (AutoAWQ, GPTQModel): facts/quantization.md §2, decoded byte by byte.

Per linear, for a weight ``[N, K]``: ``qweight`` int32 ``[K, N/8]`` and ``qzeros`` int32 ``[K/g, N/8]``, eight output
features to a word, nibble ``i`` (from the low bits) holding feature ``[0, 2, 4, 6, 1, 3, 5, 7][i]``; ``scales``
``[K/g, N]``. Always 4 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.importers.packed import PackedCheckpoint, PackedWeight, expect, expect_matrix, integers
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.model.importers.unpack import unpack_words
from vlmexport.quantize.tensor import QuantizedTensor

_NIBBLE_HOLDS = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read(config: Mapping[str, Any], stored: StoredTensors) -> PackedCheckpoint:
    """Every quantized linear of `stored`; see `vlmexport.model.importers.read_packed` for the errors."""
    layout = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    if layout != "gemm" or config.get("backend") == "llm-awq":
        name = "llm-awq" if layout == "gemm" else layout
        raise UnsupportedModelError(
            f"the AWQ checkpoint is packed for the {name} kernel; only the gemm layout is read: give such a "
            "checkpoint, or the original weights"
        )
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise UnsupportedModelError(f"the AWQ checkpoint says {bits} bits; the gemm layout holds 4")
    symmetric = config.get("zero_point") is False
    weights = [_packed(module, symmetric, stored) for module in stored.with_suffix(".qweight")]
    return PackedCheckpoint("awq", tuple(weights))


def _packed(module: str, symmetric: bool, stored: StoredTensors) -> PackedWeight:
    parts = tuple(f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    return PackedWeight(f"{module}.weight", parts, functools.partial(_decode, module, symmetric, stored))


def _decode(module: str, symmetric: bool, stored: StoredTensors) -> QuantizedTensor:
    qweight = expect_matrix(f"{module}.qweight", stored[f"{module}.qweight"])
    scales = expect_matrix(f"{module}.scales", stored[f"{module}.scales"])
    groups, rows = scales.shape
    features = qweight.shape[0]
    expect(f"{module}.qweight", qweight, (features, rows // 8), (torch.int32,))
    qzeros = expect(f"{module}.qzeros", stored[f"{module}.qzeros"], (groups, rows // 8), (torch.int32,))
    expect(f"{module}.scales", scales, (groups, rows // 8 * 8), _FLOATS)
    codes, zero = _columns(qweight).t().contiguous(), _columns(qzeros).t()
    made = integers(f"{module}.weight", codes, scales.t(), zero, 4)
    if symmetric and made.zero_point is not None:
        raise BadInputError(f"{module}.qzeros: the config says zero_point false, but the zero points are not all 8")
    return made


def _columns(words: torch.Tensor) -> torch.Tensor:
    """Words ``[rows, W]`` to codes ``[rows, W * 8]`` in the order of the output features."""
    nibbles = unpack_words(words, 4, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
    out = torch.empty_like(nibbles)
    out[..., list(_NIBBLE_HOLDS)] = nibbles
    return out.reshape(words.shape[0], -1)
