"""compressed-tensors checkpoints (llm-compressor): facts/quantization.md §2, and that library's own file format.

Per linear, for a weight ``[N, K]``, pack-quantized: ``weight_packed`` int32 ``[N, ceil(K*bits/32)]``, codes end to end
along K from the low bits, offset by ``2**(bits-1)``; ``weight_shape`` ``[2]``; ``weight_scale`` ``[N, K/g]``;
``weight_zero_point`` int32 ``[ceil(N*bits/32), K/g]``, packed along N, where asymmetric. int-quantized and
float-quantized: ``weight`` int8 or float8_e4m3fn ``[N, K]`` with ``weight_scale``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.importers.packed import PackedCheckpoint, PackedWeight, expect, integers, levels
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.model.importers.unpack import unpack_words
from vlmexport.quantize.fp8 import e4m3_codebook
from vlmexport.quantize.tensor import QuantizedTensor

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STRATEGIES = ("tensor", "channel", "group")


@dataclass(frozen=True)
class _Declared:
    """What a config group says of its weights; `group_size` is None for one scale per row or per matrix."""

    bits: int
    kind: str
    group_size: int | None
    symmetric: bool


def read(config: Mapping[str, Any], stored: StoredTensors) -> PackedCheckpoint:
    """Every quantized linear of `stored`; see `vlmexport.model.importers.read_packed` for the errors.

    Activations that the recipe quantizes on the fly are left alone (a note says so): codes of weights mean the same
    without. Activation scales from calibration, quantized caches, rotations and sparsity are refused.
    """
    _refuse_more_than_weights(config)
    groups = _groups(config)
    declared = frozenset(_declared(group) for group in groups)
    notes = {note for group in groups if (note := _activation_note(group))}
    packed = [
        _packed(m, declared, stored, "weight_packed", _decode_packed) for m in stored.with_suffix(".weight_packed")
    ]
    plain = [
        _packed(m, declared, stored, "weight", _decode_plain)
        for m in stored.with_suffix(".weight_scale")
        if f"{m}.weight" in stored
    ]
    return PackedCheckpoint("compressed-tensors", (*packed, *plain), tuple(sorted(notes)))


def _refuse_more_than_weights(config: Mapping[str, Any]) -> None:
    layout = config.get("format")
    if layout not in _FORMATS:
        raise UnsupportedModelError(
            f"the compressed-tensors checkpoint has format {layout!r}; read are {', '.join(_FORMATS)}"
        )
    if config.get("kv_cache_scheme"):
        raise UnsupportedModelError("the compressed-tensors checkpoint quantizes its KV cache; that is not imported")
    if config.get("transform_config"):
        raise UnsupportedModelError("the compressed-tensors checkpoint rotates activations at run time; not imported")
    sparsity = config.get("sparsity_config") or {}
    layout = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if layout != "dense":
        raise UnsupportedModelError(f"the compressed-tensors checkpoint is sparse ({layout}); not imported")


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise BadInputError("quantization_config has no config_groups, or one that is no table of settings")
    return list(groups.values())


def _declared(group: Mapping[str, Any]) -> _Declared:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise BadInputError("a config group of quantization_config says nothing of weights")
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "channel"))
    if strategy not in _STRATEGIES:
        raise UnsupportedModelError(f"scales per {strategy} are not imported; read are {', '.join(_STRATEGIES)}")
    size = weights.get("group_size") if strategy == "group" else None
    if size is not None and not isinstance(size, int):
        raise BadInputError(f"a config group of quantization_config has group_size {size!r}; it must be a number")
    kind, bits = str(weights.get("type", "int")), weights.get("num_bits")
    if kind not in ("int", "float") or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise UnsupportedModelError(f"weights of type {kind} with {bits} bits are not imported")
    return _Declared(bits, kind, None if size in (None, -1) else size, bool(weights.get("symmetric", True)))


def _activation_note(group: Mapping[str, Any]) -> str:
    """What is not carried on of a group's activations; raises where its weights would not mean the same without."""
    if group.get("output_activations"):
        raise UnsupportedModelError(
            "the compressed-tensors checkpoint quantizes outputs of layers; that is not imported"
        )
    activations = group.get("input_activations")
    if not activations:
        return ""
    if not isinstance(activations, dict):
        raise BadInputError(f"a config group of quantization_config has input_activations {activations!r}")
    kind = f"{activations.get('type', 'int')}{activations.get('num_bits', 8)}"
    if activations.get("dynamic") is not True:
        raise UnsupportedModelError(
            f"the compressed-tensors checkpoint has static {kind} activations with scales of its own; only weights and "
            "dynamic activations are imported"
        )
    return f"its dynamic {kind} activations are not part of the import: only weights are"


Decode = Callable[[str, frozenset[_Declared], StoredTensors], QuantizedTensor]


def _packed(
    module: str, declared: frozenset[_Declared], stored: StoredTensors, main: str, decode: Decode
) -> PackedWeight:
    kinds = (main, "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    parts = tuple(name for kind in kinds if (name := f"{module}.{kind}") in stored)
    return PackedWeight(f"{module}.weight", parts, functools.partial(decode, module, declared, stored))


def _decode_packed(module: str, declared: frozenset[_Declared], stored: StoredTensors) -> QuantizedTensor:
    packed, rows, columns = stored[f"{module}.weight_packed"], *_shape(module, stored)
    bits = _bits(module, columns, declared, stored)
    words = -(-columns * bits // 32)
    expect(f"{module}.weight_packed", packed, (rows, words), (torch.int32,))
    scale = _scale(module, rows, stored)
    _check_order(module, columns, scale.shape[1], stored)
    zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    name = f"{module}.weight_zero_point"
    if name in stored:
        shape = (-(-rows * bits // 32), scale.shape[1])
        zero = unpack_words(expect(name, stored[name], shape, (torch.int32,)).t().contiguous(), bits, rows).t()
    made = integers(f"{module}.weight", unpack_words(packed, bits, columns), scale, zero, bits)
    _check_declared(module, made, "int", name not in stored, declared)
    return made


def _decode_plain(module: str, declared: frozenset[_Declared], stored: StoredTensors) -> QuantizedTensor:
    weight = stored[f"{module}.weight"]
    if weight.ndim != 2:
        raise UnsupportedModelError(f"{module}.weight has {weight.ndim} axes; only linear layers are imported")
    scale = _scale(module, weight.shape[0], stored)
    if weight.dtype == torch.float8_e4m3fn:
        made = levels(f"{module}.weight", weight.view(torch.uint8), scale, 8, e4m3_codebook())
        _check_declared(module, made, "float", True, declared)
        return made
    expect(f"{module}.weight", weight, tuple(weight.shape), (torch.int8,))
    bits = _only_bits(module, declared)
    middle = 1 << (bits - 1)
    wide = weight.to(torch.int16) + middle
    if int(wide.min()) < 0 or int(wide.max()) >= 2 * middle:
        raise BadInputError(f"{module}.weight holds codes that {bits} bits do not")
    zero = torch.full(scale.shape, middle, dtype=torch.int16)
    name = f"{module}.weight_zero_point"
    if name in stored:
        zero = expect(name, stored[name], tuple(scale.shape), (torch.int8,)).to(torch.int16) + middle
    made = integers(f"{module}.weight", wide.to(torch.uint8), scale, zero, bits)
    _check_declared(module, made, "int", name not in stored, declared)
    return made


def _shape(module: str, stored: StoredTensors) -> tuple[int, int]:
    name = f"{module}.weight_shape"
    sizes = [int(n) for n in stored[name].reshape(-1).tolist()]
    if len(sizes) != 2 or min(sizes) <= 0:
        raise BadInputError(f"{name} says {sizes}; a linear layer's weight has two sizes")
    return sizes[0], sizes[1]


def _bits(module: str, columns: int, declared: frozenset[_Declared], stored: StoredTensors) -> int:
    """The declared width whose packing has as many words as there are."""
    words = (stored.shape(f"{module}.weight_packed") or (0,))[-1]
    widths = sorted({d.bits for d in declared if d.kind == "int"})
    found = [bits for bits in widths if -(-columns * bits // 32) == words]
    if not found:
        raise BadInputError(
            f"{module}.weight_packed has {words} words for {columns} input features: no packing of "
            f"{' or '.join(map(str, widths)) or 'any'} bits, which the config says"
        )
    return found[0]


def _only_bits(module: str, declared: frozenset[_Declared]) -> int:
    widths = sorted({d.bits for d in declared if d.kind == "int"})
    if len(widths) != 1:
        raise UnsupportedModelError(f"{module}.weight is int8, and the config has int weights of {widths} bits: which?")
    return widths[0]


def _scale(module: str, rows: int, stored: StoredTensors) -> torch.Tensor:
    """``weight_scale`` as ``[N, groups]``; one scale for the whole matrix is repeated for every row."""
    name = f"{module}.weight_scale"
    scale = stored[name]
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    if scale.ndim == 1:
        scale = scale.unsqueeze(1)
    return expect(name, scale, (rows, *scale.shape[1:2]), _FLOATS)


def _check_order(module: str, columns: int, groups: int, stored: StoredTensors) -> None:
    name = f"{module}.weight_g_idx"
    if name not in stored or groups == 0 or columns % groups:
        return
    if not torch.equal(stored[name].long(), torch.arange(columns) // (columns // groups)):
        raise UnsupportedModelError(
            f"{name} puts input features into groups out of order (actorder: group); no target runs that exactly: "
            "quantize the original weights with --quant gptq, whose act-order keeps static groups"
        )


def _check_declared(
    module: str, made: QuantizedTensor, kind: str, symmetric: bool, declared: frozenset[_Declared]
) -> None:
    """Refuse a matrix that no config group describes: then the config, or the decoding, is wrong."""
    groups = made.scale.shape[1]
    for d in declared:
        size_fits = groups == 1 if d.group_size is None else d.group_size == made.group_size
        if (d.bits, d.kind, d.symmetric) == (made.bits, kind, symmetric) and size_fits:
            return
    zero = "without" if symmetric else "with"
    raise BadInputError(
        f"{module}: its tensors hold {made.bits}-bit {kind} codes in groups of {made.group_size} {zero} zero points, "
        "which no config group says"
    )
