"""bitsandbytes checkpoints, NF4: facts/quantization.md §2 and `bitsandbytes.functional.QuantState`.

Per linear, for a weight ``[N, K]``: ``weight`` ``N*K/2`` bytes, two codes each, the first in the high nibble, in rows;
``weight.absmax`` float32, one per block of 64 or more codes; ``weight.quant_map`` float32 ``[16]``, the levels;
``weight.quant_state.bitsandbytes__nf4`` JSON bytes with shape and block size. Nested: ``absmax`` are codes of
``weight.nested_quant_map`` ``[256]``, scaled by ``weight.nested_absmax`` per block, plus an offset from the JSON.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.importers.packed import PackedCheckpoint, PackedWeight, expect, levels
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.quantize.nf4 import NESTED_BLOCK
from vlmexport.quantize.tensor import QuantizedTensor

_STATE = ".weight.quant_state.bitsandbytes__nf4"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


def read(config: Mapping[str, Any], stored: StoredTensors) -> PackedCheckpoint:
    """Every quantized linear of `stored`; see `vlmexport.model.importers.read_packed` for the errors."""
    kind = str(config.get("bnb_4bit_quant_type", "fp4")) if config.get("load_in_4bit") else "int8"
    if kind != "nf4":
        raise UnsupportedModelError(
            f"the bitsandbytes checkpoint is {kind}; only nf4 is read: give such a checkpoint, or the original weights"
        )
    return PackedCheckpoint("bitsandbytes", tuple(_packed(module, stored) for module in stored.with_suffix(_STATE)))


def _packed(module: str, stored: StoredTensors) -> PackedWeight:
    weight = f"{module}.weight"
    parts = [weight, *(f"{weight}.{part}" for part in _PARTS)]
    return PackedWeight(weight, tuple(p for p in parts if p in stored), functools.partial(_decode, weight, stored))


def _decode(weight: str, stored: StoredTensors) -> QuantizedTensor:
    state = _state(weight, stored)
    rows, columns = state["shape"]
    block = state["blocksize"]
    if block <= 0 or columns % block:
        raise UnsupportedModelError(
            f"{weight}: blocks of {block} codes run over the ends of its rows of {columns}; no target stores that"
        )
    packed = stored[weight].contiguous().reshape(-1).view(torch.uint8)
    expect(weight, packed, (rows * columns // 2,), (torch.uint8,))
    quant_map = expect(f"{weight}.quant_map", stored[f"{weight}.quant_map"], (16,), (torch.float32,))
    absmax = _absmax(weight, rows * columns // block, state, stored)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(rows, columns)
    return levels(weight, codes, absmax.reshape(rows, columns // block), 4, quant_map)


def _state(weight: str, stored: StoredTensors) -> dict[str, Any]:
    """What bitsandbytes keeps as JSON: shape, block size, and those of the nested scales."""
    name = f"{weight}.quant_state.bitsandbytes__nf4"
    try:
        state = json.loads(bytes(stored[name].tolist()))
        shape = tuple(int(n) for n in state["shape"])
        block, outer = int(state["blocksize"]), int(state.get("nested_blocksize", NESTED_BLOCK))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{name} holds no shape and block size: {error}") from error
    if len(shape) != 2 or min(shape) <= 0:
        raise BadInputError(f"{name} says shape {shape}; a linear layer's weight has two sizes")
    if outer <= 0 or math.prod(shape) % 2:
        raise BadInputError(f"{name} says shape {shape} and nested_blocksize {outer}; no codes are stored so")
    return {**state, "shape": shape, "blocksize": block, "nested_blocksize": outer, "nested_offset": offset}


def _absmax(weight: str, blocks: int, state: Mapping[str, Any], stored: StoredTensors) -> torch.Tensor:
    """The float32 scales ``[blocks]``, un-nested by the arithmetic of `bitsandbytes.functional.dequantize_4bit`."""
    name = f"{weight}.absmax"
    if f"{weight}.nested_absmax" not in stored:
        return expect(name, stored[name], (blocks,), (torch.float32,))
    codes = expect(name, stored[name], (blocks,), (torch.uint8,))
    size = state["nested_blocksize"]
    outer_name = f"{weight}.nested_absmax"
    outer = expect(outer_name, stored[outer_name], (-(-blocks // size),), (torch.float32,))
    map_name = f"{weight}.nested_quant_map"
    quant_map = expect(map_name, stored[map_name], (256,), (torch.float32,))
    scaled = quant_map[codes.long()] * outer.repeat_interleave(size)[:blocks]
    return scaled + torch.tensor(state["nested_offset"])
