"""Codes of ours as ggml's blocks, without loss: the bytes dequantize to the very weight that the codes stand for.

A block of 32 (ggml-common.h): float16 scale ``d``, in Q4_1 float16 ``m``, then the codes; a byte of the 4-bit types
holds code ``j`` in its low and code ``j + 16`` in its high half.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.code_types import BLOCK, codes_type
from vlmexport.quantize.tensor import QuantizedTensor

__all__ = ["codes_type", "pack_codes"]


def pack_codes(tensor: QuantizedTensor, type_name: str, name: str = "weight") -> NDArray[np.uint8]:
    """The blocks of `tensor` ``[N, K]`` as `type_name`: uint8 ``[N, row bytes]``; rows and columns keep their order.

    Groups of a multiple of 32 are cut into blocks of the same scale. Raises `BadInputError`, with `name`, for codes
    that the type does not hold, and for scales (in Q4_1 also offsets) that a float16 does not hold exactly.
    """
    _check(tensor, type_name, name)
    own = tensor.regrouped(BLOCK)
    codes = own.codes.contiguous().numpy().reshape(own.shape[0], -1, BLOCK)
    parts = [_float16(own.scale, f"{name}: a scale"), *_PACKERS[type_name](own, codes, name)]
    return np.concatenate(parts, axis=2).reshape(own.shape[0], -1)


def _check(tensor: QuantizedTensor, type_name: str, name: str) -> None:
    wanted = _FORMS.get(type_name)
    if wanted is None:
        raise BadInputError(f"{name}: {type_name} is no type for codes of ours; they go to {', '.join(_FORMS)}")
    bits, symmetric = wanted
    if tensor.codebook is not None or tensor.bits != bits or (symmetric and tensor.zero_point is not None):
        kind = "codebook" if tensor.codebook is not None else "sym" if tensor.zero_point is None else "asym"
        raise BadInputError(f"{name}: {type_name} does not hold its {tensor.bits}-bit {kind} codes")
    for what, size in (("group size", tensor.group_size), ("number of input features", tensor.shape[1])):
        if size % BLOCK:
            raise BadInputError(f"{name}: its {what} is {size}, not a multiple of {BLOCK} as ggml's blocks")


def _float16(values: torch.Tensor, what: str) -> NDArray[np.uint8]:
    """Float values ``[N, blocks]`` as the bytes of float16, ``[N, blocks, 2]``; refuses those that would change."""
    half = values.to(torch.float16)
    wrong = half.to(values.dtype) != values
    if bool(wrong.any()):
        worst = float(values[wrong].abs().max())
        raise BadInputError(
            f"{what} of {worst:.6g} is no float16, so the codes cannot be handed over without loss; choose a file type "
            "such as Q4_K_M, which quantizes the weights anew"
        )
    return np.ascontiguousarray(half.numpy().astype("<f2")).view(np.uint8).reshape(*values.shape, 2)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    packed: NDArray[np.uint8] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << np.uint8(4)
    return packed


def _q4_0(_tensor: QuantizedTensor, codes: NDArray[np.uint8], _name: str) -> list[NDArray[np.uint8]]:
    return [_nibbles(codes)]


def _q4_1(tensor: QuantizedTensor, codes: NDArray[np.uint8], name: str) -> list[NDArray[np.uint8]]:
    zero = torch.full_like(tensor.scale, 8) if tensor.zero_point is None else tensor.zero_point
    return [_float16(-zero.double() * tensor.scale.double(), f"{name}: an offset"), _nibbles(codes)]


def _q8_0(_tensor: QuantizedTensor, codes: NDArray[np.uint8], _name: str) -> list[NDArray[np.uint8]]:
    return [codes ^ np.uint8(0x80)]  # minus 128, as int8


# Type: bits, and whether only symmetric codes fit.
_FORMS: dict[str, tuple[int, bool]] = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True)}
_PACKERS: dict[str, Callable[[QuantizedTensor, NDArray[np.uint8], str], list[NDArray[np.uint8]]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
