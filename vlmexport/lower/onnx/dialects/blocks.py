"""Masks with blocks of tokens that see each other, in operators that every runtime has.

A block never goes on over two calls, so the ids of the new tokens say it all: query i sees key j when j comes before
it, or when both are new and of the same block.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.split.masks import BlockMasks

_INT64 = ir.DataType.INT64


def same_block(tape: Tape, new: ir.Value, keys: ir.Value) -> ir.Value:
    """Boolean ``[B, 1, S, T]`` from the ids of the new tokens ``[B, S]`` and of all keys ``[B, T]``."""
    zero = _constant(tape, 0, "blocks.none")
    rows, columns = _constant(tape, [1, 3], "blocks.rows"), _constant(tape, [1, 2], "blocks.columns")
    queries = tape.op("Unsqueeze", [new, rows])
    same = tape.op("Equal", [queries, tape.op("Unsqueeze", [keys, columns])])
    return tape.op("And", [same, tape.op("Greater", [queries, zero])])


def behind_past(tape: Tape, new: ir.Value, past: ir.Value) -> ir.Value:
    """Ids ``[B, T]`` of all keys: 0 for the `past` (scalar) tokens, then those of the new ones ``[B, S]``."""
    first, last = _constant(tape, [0], "blocks.pad_first"), _constant(tape, [0, 0], "blocks.pad_last")
    count = tape.op("Unsqueeze", [past, first])
    return tape.op("Pad", [new, tape.op("Concat", [first, count, last], {"axis": 0})])


def visible(
    tape: Tape, blocks: BlockMasks, window: ir.Value | None, queries: ir.Value, keys: ir.Value, same: ir.Value
) -> ir.Value:
    """Boolean ``[B, 1, S, T]``: does a query see a key? `BlockMasks` says how its parts combine.

    `queries` and `keys` are slots that broadcast to ``[B, 1, S, T]``; `window` is a scalar or None.
    """
    causal = tape.op("LessOrEqual", [keys, queries])
    if window is None:
        return tape.op("Or", [causal, same]) if blocks.whole else causal
    near = tape.op("Greater", [keys, tape.op("Sub", [queries, window])])
    if blocks.cut:
        return tape.op("And", [tape.op("Or", [causal, same]), near])
    return tape.op("Or", [tape.op("And", [causal, near]), same])


def _constant(tape: Tape, value: int | list[int], name: str) -> ir.Value:
    return tape.initializer(ir.tensor(value, dtype=_INT64, name=name))
