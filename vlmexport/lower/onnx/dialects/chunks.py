"""Chunks of tokens in a graph: a token sees those of its own chunk alone."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

_INT64 = ir.DataType.INT64


def same_chunk(tape: Tape, ranks: tuple[ir.Value, ir.Value], chunk: int) -> ir.Value:
    """Bool ``[B, 1, S, T]``: do a query and a key lie in one chunk of `chunk` tokens?

    `ranks` are queries ``[B, 1, S, 1]`` and keys ``[B, 1, 1, T]`` in valid tokens, counted from 1.
    """
    one = tape.initializer(ir.tensor(1, dtype=_INT64, name=f"chunk.{chunk}.one"))
    size = tape.initializer(ir.tensor(chunk, dtype=_INT64, name=f"chunk.{chunk}.size"))
    # Padding before the first token has rank 0, of which no division is asked: it is hidden anyway.
    zero = tape.initializer(ir.tensor(0, dtype=_INT64, name=f"chunk.{chunk}.zero"))
    queries, keys = (tape.op("Div", [tape.op("Max", [tape.op("Sub", [side, one]), zero]), size]) for side in ranks)
    return tape.op("Equal", [queries, keys])
