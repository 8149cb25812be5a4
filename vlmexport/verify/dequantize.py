"""Matrices that a graph stores as ``DequantizeLinear`` in front of ``MatMul`` (docs/manifest.md, layout ``tensorrt``).

Written from the operator's documentation and docs/manifest.md, sharing no code with the emitter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import ArtifactError
from vlmexport.quantize.tensor import QuantizedTensor

if TYPE_CHECKING:
    import onnx_ir as ir

_BITS = {"int4": 4, "int8": 8}


def unpack_dequantized(codes: NDArray[Any], scale: NDArray[Any], *, axis: int, block_size: int) -> QuantizedTensor:
    """The logical tensor behind ``codes`` ``[K, N]`` of one node, which are centred on zero.

    int4 or int8 with ``scale`` ``[ceil(K / block_size), N]`` on axis 0, or int8 with ``scale`` ``[N]`` on axis 1 and no
    blocks; scales are float16 or float32. Raises `ArtifactError` for any other form.
    """
    bits = _BITS.get(codes.dtype.name, 0)
    columns, rows = codes.shape if codes.ndim == 2 else (0, 0)
    group_size = block_size or columns
    blocked = bits and block_size and (axis, scale.shape) == (0, (-(-columns // block_size), rows))
    by_channel = bits == 8 and not block_size and (axis, scale.shape) == (1, (rows,))
    if not (blocked or by_channel) or scale.dtype not in (np.float16, np.float32):
        raise ArtifactError(
            f"{codes.dtype} codes {list(codes.shape)} with {scale.dtype} scales {list(scale.shape)} on axis {axis} in "
            f"blocks of {block_size} are no quantized matrix of this layout"
        )
    logical = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return QuantizedTensor(
        codes=torch.from_numpy(np.ascontiguousarray(logical.T)),
        scale=torch.from_numpy(scale.reshape(-1, rows).T.copy()),
        zero_point=None,
        bits=bits,
        group_size=group_size,
    )


def require_matrix_products(node: ir.Node) -> None:
    """Raise `ArtifactError` unless the matrix of `node` goes into products only, as their right operand."""
    (output,) = node.outputs
    users = [f"{user.op_type} (operand {index})" for user, index in output.uses() if not _is_weight_of(user, index)]
    if output.is_graph_output():
        users.append("the graph's outputs")
    if users or not output.uses():
        raise ArtifactError(f"its values go to {users[0] if users else 'nothing'} and not to a MatMul alone")


def _is_weight_of(user: ir.Node, index: int) -> bool:
    return user.op_type == "MatMul" and user.domain == "" and index == 1
