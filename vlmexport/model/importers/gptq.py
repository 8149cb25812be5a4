"""GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round), versions 1 and 2: facts/quantization.md §2, decoded byte by byte.

Per linear, for a weight ``[N, K]``: ``qweight`` int32 ``[K*bits/32, N]``, codes end to end along K from the low bits;
``qzeros`` int32 ``[K/g, N*bits/32]``, the same along N, holding the zero point minus one in version 1 (wrapping) and
itself in version 2; ``scales`` ``[K/g, N]``; ``g_idx`` int32 ``[K]``, the group of every input feature.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.importers.packed import PackedCheckpoint, PackedWeight, expect, expect_matrix, integers
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.model.importers.unpack import unpack_words
from vlmexport.quantize.tensor import QuantizedTensor

_BITS = (2, 3, 4, 8)
# What version 1 adds to its stored zero points.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Recipe:
    """What the config says of every matrix; `widths` are the bits that occur."""

    layout: str
    widths: tuple[int, ...]
    symmetric: bool


def read(config: Mapping[str, Any], stored: StoredTensors) -> PackedCheckpoint:
    """Every quantized linear of `stored`; see `vlmexport.model.importers.read_packed` for the errors."""
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if layout not in _ZERO_OFFSETS:
        raise UnsupportedModelError(
            f"the GPTQ checkpoint is packed as {layout!r}, for one kernel only; read are {', '.join(_ZERO_OFFSETS)}: "
            "save it in one of them, or give the original weights"
        )
    recipe = _Recipe(layout, _widths(config), bool(config.get("sym")))
    weights = [_packed(module, recipe, stored) for module in stored.with_suffix(".qweight")]
    return PackedCheckpoint("gptq", tuple(weights))


def _widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The bits that the config names: GPTQModel's ``dynamic`` gives some layers others."""
    overrides = config.get("dynamic")
    others = overrides.values() if isinstance(overrides, dict) else ()
    named = [config.get("bits"), *(other.get("bits") for other in others if isinstance(other, dict))]
    widths = tuple(bits for bits in _BITS if bits in named)
    if not widths:
        raise UnsupportedModelError(
            f"the GPTQ checkpoint says bits {config.get('bits')}; read are {', '.join(map(str, _BITS))}"
        )
    return widths


def _packed(module: str, recipe: _Recipe, stored: StoredTensors) -> PackedWeight:
    parts = [f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx")]
    decode = functools.partial(_decode, module, recipe, stored)
    return PackedWeight(f"{module}.weight", tuple(p for p in parts if p in stored), decode)


def _decode(module: str, recipe: _Recipe, stored: StoredTensors) -> QuantizedTensor:
    qweight = expect_matrix(f"{module}.qweight", stored[f"{module}.qweight"])
    scales = expect_matrix(f"{module}.scales", stored[f"{module}.scales"])
    rows, groups = qweight.shape[-1], scales.shape[0]
    features, bits = _features_and_bits(module, recipe, stored)
    _check_order(module, features, groups, stored)
    expect(f"{module}.qweight", qweight, (features * bits // 32, rows), (torch.int32,))
    expect(f"{module}.scales", scales, (groups, rows), _FLOATS)
    qzeros = expect(f"{module}.qzeros", stored[f"{module}.qzeros"], (groups, -(-rows * bits // 32)), (torch.int32,))
    codes = unpack_words(qweight.t().contiguous(), bits, features)
    zero = (unpack_words(qzeros, bits, rows).t() + _ZERO_OFFSETS[recipe.layout]) & ((1 << bits) - 1)
    made = integers(f"{module}.weight", codes, scales.t(), zero, bits)
    if recipe.symmetric and made.zero_point is not None:
        raise BadInputError(
            f"{module}.qzeros: the config says sym and checkpoint_format {recipe.layout}, but read so the zero points "
            f"are not {1 << (bits - 1)}; the other version (gptq or gptq_v2) may be meant"
        )
    return made


def _features_and_bits(module: str, recipe: _Recipe, stored: StoredTensors) -> tuple[int, int]:
    """K and the bits: the width of the config's that fits both ``g_idx`` and ``qweight``."""
    name = f"{module}.g_idx"
    if name not in stored:
        raise BadInputError(f"the tensor {name} is missing from the weight files; without it {module} has no width")
    features, words = math.prod(stored.shape(name)), stored.shape(f"{module}.qweight")[0]
    found = [bits for bits in recipe.widths if features * bits == words * 32]
    if not found:
        raise BadInputError(
            f"{module}.qweight has {words} words for the {features} input features of g_idx: no packing of "
            f"{' or '.join(map(str, recipe.widths))} bits, which the config says"
        )
    return features, found[0]


def _check_order(module: str, features: int, groups: int, stored: StoredTensors) -> None:
    g_idx = stored[f"{module}.g_idx"]
    if groups == 0 or features % groups:
        raise BadInputError(f"{module}.scales has {groups} groups for {features} input features")
    natural = torch.arange(features) // (features // groups)
    if not torch.equal(g_idx.long(), natural):
        raise UnsupportedModelError(
            f"{module}.g_idx puts input features into groups out of order (act-order without static groups); no target "
            "runs that exactly: quantize the original weights with --quant gptq, whose act-order keeps static groups"
        )
