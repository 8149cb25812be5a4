"""Standard ONNX operators only: opset-23 Attention with an explicit mask, right for any padding.

Used where left padding is needed. Positions are an input, the rotary embedding is part of the trace, and the mask is
built in the graph: query i sees key j when ``j <= past + i``, j is valid in ``attention_mask`` and within the window.
Tokens of one block see each other, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.dialect import AttentionCall, AttentionResult
from vlmexport.lower.onnx.dialects.blocks import behind_past, same_block, visible
from vlmexport.lower.onnx.dialects.chunks import same_chunk
from vlmexport.lower.onnx.dialects.growing import GrowingCache
from vlmexport.lower.onnx.shared_kv import SharedCall, over_cache
from vlmexport.split.masks import BlockMasks

_INT64 = ir.DataType.INT64
# Far below every score, and near enough to zero that none added to it leaves the range of its type.
_LOWEST = {ir.DataType.FLOAT: -1e38, ir.DataType.FLOAT16: -3e4}


@dataclass
class StandardDialect(GrowingCache):
    """The ``standard`` form of a decoder."""

    opset: int
    blocks: BlockMasks | None = None
    needs_position_ids: bool = True
    packs_qkv: bool = False
    cache_type: ir.DataType | None = None
    shared: dict[str, ir.Value] = field(default_factory=dict)
    windows: dict[tuple[int, int], ir.Value] = field(default_factory=dict)
    summands: dict[int, ir.Value] = field(default_factory=dict)

    def prologue(self, tape: Tape, inputs: dict[str, ir.Value], past_key: ir.Value) -> None:
        """Slots of queries and keys, and the key validity."""
        mask = inputs["attention_mask"]
        zero, one = (tape.initializer(ir.tensor(n, dtype=_INT64, name=f"mask.{n}")) for n in (0, 1))
        past = tape.op("Squeeze", [tape.op("Shape", [past_key], {"start": 2, "end": 3})])
        total = tape.op("Squeeze", [tape.op("Shape", [mask], {"start": 1, "end": 2})])
        column = tape.initializer(ir.tensor([1], dtype=_INT64, name="mask.column"))
        keys = tape.op("Range", [zero, total, one])
        queries = tape.op("Unsqueeze", [tape.op("Range", [past, total, one]), column])
        heads = tape.initializer(ir.tensor([1, 2], dtype=_INT64, name="mask.heads"))
        valid = tape.op("Cast", [tape.op("Unsqueeze", [mask, heads])], {"to": int(ir.DataType.BOOL)})
        causal = tape.op("LessOrEqual", [keys, queries])
        slots = tape.op("Mul", [mask, keys])
        last = tape.op("ReduceMax", [slots, column], {"keepdims": 0})
        self.shared = {"keys": keys, "queries": queries, "valid": valid, "causal": causal, "mask": mask, "past": past}
        if self.blocks is not None:
            self._blocks(tape, inputs, past)
        self.shared["last_valid"] = tape.op("Max", [tape.op("Sub", [last, past]), zero])

    def _blocks(self, tape: Tape, inputs: dict[str, ir.Value], past: ir.Value) -> None:
        """Which tokens share a block, and queries and keys counted in valid tokens."""
        new = inputs["block_ids"]
        queries, keys = self._ranks(tape)
        self.shared |= {
            "same": same_block(tape, new, behind_past(tape, new, past)),
            "queries": queries,
            "keys": keys,
        }

    def _ranks(self, tape: Tape) -> tuple[ir.Value, ir.Value]:
        """Queries ``[B, 1, S, 1]`` and keys ``[B, 1, 1, T]`` in valid tokens: padding takes none of a window."""
        if "rank_queries" not in self.shared:
            one = tape.initializer(ir.tensor(1, dtype=_INT64, name="ranks.axis"))
            rows, columns = (tape.initializer(ir.tensor([1, n], dtype=_INT64, name=f"ranks.{n}")) for n in (3, 2))
            last = tape.initializer(ir.tensor([1], dtype=_INT64, name="ranks.last"))
            ranks = tape.op("CumSum", [self.shared["mask"], one])
            indices = tape.op("Squeeze", [self.shared["queries"], last])
            self.shared |= {
                "rank_queries": tape.op("Unsqueeze", [tape.op("Gather", [ranks, indices], {"axis": 1}), rows]),
                "rank_keys": tape.op("Unsqueeze", [ranks, columns]),
            }
        return self.shared["rank_queries"], self.shared["rank_keys"]

    def last_valid(self, tape: Tape) -> ir.Value:
        """Index of each row's last valid new position."""
        return self.shared["last_valid"]

    def new_valid(self, tape: Tape) -> ir.Value:
        """The mask of the new tokens."""
        axis = tape.initializer(ir.tensor([0], dtype=_INT64, name="new.axis"))
        last = tape.initializer(ir.tensor([2**62], dtype=_INT64, name="new.end"))
        axes = tape.initializer(ir.tensor([1], dtype=_INT64, name="new.axes"))
        first = tape.op("Unsqueeze", [self.shared["past"], axis])
        return tape.op(
            "Cast", [tape.op("Slice", [self.shared["mask"], first, last, axes])], {"to": int(ir.DataType.BOOL)}
        )

    def rms_norm(self, tape: Tape, x: ir.Value, weight: ir.Value, epsilon: float) -> tuple[ir.Value, ir.Value | None]:
        """RMSNormalization (opset 23), computed in FP32 whatever the activation type."""
        return tape.op("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon, "stash_type": 1}), None

    def attention(self, tape: Tape, call: AttentionCall) -> AttentionResult:
        """Attention (opset 23) on 4-D tensors with past and present."""
        outputs = tape.op_multi_out(
            "Attention",
            [call.query, call.key, call.value, self._scored(tape, call), call.past_key, call.past_value],
            {"scale": call.scale, "softcap": call.softcap},
            num_outputs=3,
        )
        width = call.heads * call.head_dim
        shape = tape.initializer(ir.tensor([0, 0, width], dtype=_INT64, name=f"{call.past_key.name}.flat_shape"))
        flat = tape.op("Reshape", [tape.op("Transpose", [outputs[0]], {"perm": [0, 2, 1, 3]}), shape])
        return AttentionResult(flat, outputs[1], outputs[2])

    def shared_attention(self, tape: Tape, call: SharedCall) -> ir.Value:
        """Attention (opset 23) over the other layer's whole cache."""
        return over_cache(tape, call, self._mask(tape, call.window))

    def _scored(self, tape: Tape, call: AttentionCall) -> ir.Value:
        """The mask, or with something added to the scores that, and a number below all where nothing is seen."""
        mask = self._mask(tape, call.window, call.chunk)
        if call.added is None:
            return mask
        if call.window not in self.summands:
            queries, keys = self._ranks(tape)
            row = tape.initializer(ir.tensor([1], dtype=_INT64, name="relative.row"))
            summand = call.added.emit(tape, tape.op("Squeeze", [tape.op("Sub", [keys, queries]), row]))
            kind = summand.dtype or ir.DataType.FLOAT
            lowest = tape.initializer(ir.tensor(_LOWEST[kind], dtype=kind, name="relative.hidden"))
            self.summands[call.window] = tape.op("Where", [mask, summand, lowest])
        return self.summands[call.window]

    def _mask(self, tape: Tape, window: int, chunk: int = 0) -> ir.Value:
        """Boolean ``[B, 1, S, T]`` for a window (-1: none) or a chunk (0: none), made once."""
        if (window, chunk) not in self.windows:
            seen = self._seen(tape, window)
            if chunk:
                seen = tape.op("And", [seen, same_chunk(tape, self._ranks(tape), chunk)])
            self.windows[window, chunk] = tape.op("And", [seen, self.shared["valid"]])
        return self.windows[window, chunk]

    def _seen(self, tape: Tape, window: int) -> ir.Value:
        """`_mask`, padding included."""
        width = None
        if window > 0:
            width = tape.initializer(ir.tensor(window, dtype=_INT64, name=f"mask.window.{window}"))
        keys, queries = self.shared["keys"], self.shared["queries"]
        if self.blocks is not None:
            return visible(tape, self.blocks, width, queries, keys, self.shared["same"])
        if width is None:
            return self.shared["causal"]
        queries, keys = self._ranks(tape)
        near = tape.op("Greater", [keys, tape.op("Sub", [queries, width])])
        return tape.op("And", [self.shared["causal"], near])
