"""Attention of layers that keep no keys and values: they read the cache of an earlier layer, after its new tokens.

ONNX Runtime's GroupQueryAttention takes that cache as its past and no new keys (``kv_sequence_length`` 0, from version
1.26 on, microsoft/onnxruntime#28242); lengths, window and softcap are as for any other layer. The standard Attention
takes the cache as keys and values under the mask that the other layers of that window have.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape


@dataclass(frozen=True)
class SharedCall:
    """One attention over another layer's cache.

    `query` is ``[B, heads, S, head_dim]``, `key` and `value` what that layer's cache is after this call, ``[B,
    kv_heads, T, head_dim]`` (or longer, where buffers are). The rest is as in `AttentionCall`.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int
    layer: int


def no_keys(tape: Tape, query: ir.Value, width: int) -> ir.Value:
    """Keys or values ``[B, 0, width]`` of no tokens, of the batch and type of `query` ``[B, S, ...]``."""
    name = f"no_keys.{width}"
    zero = tape.initializer(ir.tensor([0, width], dtype=ir.DataType.INT64, name=f"{name}.shape"))
    batch = tape.op("Shape", [query], {"start": 0, "end": 1})
    fill = ir.tensor([0.0], dtype=query.dtype or ir.DataType.FLOAT, name=f"{name}.fill")
    empty = tape.op("ConstantOfShape", [tape.op("Concat", [batch, zero], {"axis": 0})], {"value": fill})
    empty.type = query.type
    return empty


def over_cache(tape: Tape, call: SharedCall, mask: ir.Value) -> ir.Value:
    """The standard Attention of `call` under a boolean `mask` ``[B, 1, S, T]``; the result is ``[B, S, heads * D]``."""
    out = tape.op("Attention", [call.query, call.key, call.value, mask], {"scale": call.scale, "softcap": call.softcap})
    width = call.heads * call.head_dim
    shape = tape.initializer(
        ir.tensor([0, 0, width], dtype=ir.DataType.INT64, name=f"layers.{call.layer}.attention.shape")
    )
    return tape.op("Reshape", [tape.op("Transpose", [out], {"perm": [0, 2, 1, 3]}), shape])
