"""Groups as ONNX Runtime's operators take them: powers of two from 16 to 256."""

from __future__ import annotations

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import PER_CHANNEL

_MIN_BLOCK, _MAX_BLOCK = 16, 256


def block_size(in_features: int, group_size: int) -> int:
    """Block size for a group size: itself, or for one group per row the largest power of two that divides K.

    MatMulNBits takes powers of two from 16 to 256; a wider group is expressed by repeating its scale. Raises
    `BadInputError` when none divides K.
    """
    width = in_features if group_size == PER_CHANNEL else group_size
    block = min(width & -width, _MAX_BLOCK)
    if block < _MIN_BLOCK:
        raise BadInputError(
            f"a weight has {in_features} input features; MatMulNBits needs a block of {_MIN_BLOCK} or more that divides"
        )
    return block
