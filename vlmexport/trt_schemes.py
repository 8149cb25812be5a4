"""Which integer weights TensorRT's DequantizeLinear takes: symmetric, INT4 in blocks or INT8 with one scale per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme, make_scheme

if TYPE_CHECKING:
    from vlmexport.model.importers.packed import CodeFormat

# Block sizes of INT4 weights, NVIDIA's own first.
BLOCKS = (128, 64, 32)
_INT8_BITS = 8


def check_tensorrt_scheme(scheme: QuantScheme) -> None:
    """Raise `BadInputError` for codes that the parser refuses."""
    if not scheme.symmetric:
        raise BadInputError("TensorRT takes no zero points (its parser refuses asymmetric weights)")
    if algorithm(scheme.algorithm).codebook:
        raise BadInputError(f"TensorRT has no product with {scheme.algorithm} weights")
    if scheme.bits == _INT8_BITS and scheme.group_size != PER_CHANNEL:
        raise BadInputError(
            f"TensorRT takes INT8 weights with one scale per output channel, not groups of {scheme.group_size}; "
            "choose --group-size -1, or leave it out"
        )
    if scheme.bits != _INT8_BITS and scheme.group_size not in (*BLOCKS, PER_CHANNEL):
        sizes = ", ".join(map(str, BLOCKS))
        raise BadInputError(f"group size is {scheme.group_size}; TensorRT's INT4 weights take {sizes}")


def fitting_block(widths: set[int], name: str = "a weight") -> int:
    """The largest of `BLOCKS` that divides every one of the input `widths`; raises `BadInputError` when none does."""
    for block in BLOCKS:
        if all(width % block == 0 for width in widths):
            return block
    odd = min(width for width in widths if width % BLOCKS[-1])
    raise BadInputError(
        f"{name} has {odd} input features, not a multiple of {BLOCKS[-1]}, the smallest block of TensorRT's INT4 "
        "weights; leave it unquantized with --keep, or choose --quant int8"
    )


def requantized_scheme(codes: CodeFormat, name: str) -> QuantScheme:
    """What codes that TensorRT cannot hold become under ``--requantize``: rounded to nearest, as many bits or more."""
    if codes.bits == _INT8_BITS:
        return make_scheme("rtn", _INT8_BITS, PER_CHANNEL)
    return make_scheme("rtn", 4, fitting_block({codes.in_features}, name))
