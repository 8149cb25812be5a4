"""What the dialects of ONNX Runtime share: a cache that grows with every call, and logits of the last valid rows."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.weights import typed_value
from vlmexport.split.masks import BlockMasks

_INT64 = ir.DataType.INT64


class GrowingCache:
    """The inputs and outputs of decoders that are given an attention mask and a cache of the past tokens alone.

    `blocks`: where tokens of one block see each other, the decoder takes their ``block_ids``, too.
    """

    ir_version: int = 10
    domains: Mapping[str, int] = {"com.microsoft": 1}
    cache_lengths: tuple[int | str, int | str] = ("past_sequence_length", "total_sequence_length")
    wide_norms: bool = False
    blocks: BlockMasks | None = None

    def inputs(self, kind: ir.DataType, hidden_size: int) -> dict[str, ir.Value]:
        """Embeddings, mask of all tokens so far, positions of the new ones, and how many rows of logits to make."""
        tokens = ["batch_size", "sequence_length"]
        return {
            "inputs_embeds": typed_value("inputs_embeds", kind, [*tokens, hidden_size]),
            "attention_mask": typed_value("attention_mask", _INT64, ["batch_size", "total_sequence_length"]),
            "position_ids": typed_value("position_ids", _INT64, tokens),
            **({} if self.blocks is None else {"block_ids": typed_value("block_ids", _INT64, tokens)}),
            "num_logits_to_keep": typed_value("num_logits_to_keep", _INT64, []),
        }

    def positions(self, inputs: dict[str, ir.Value]) -> ir.Value:
        """int64 ``[B, S]``: the graph input."""
        return inputs["position_ids"]

    def last_valid(self, tape: Tape) -> ir.Value:
        """int64 ``[B]``: index, among the new positions, of each row's last valid one."""
        raise NotImplementedError

    def new_valid(self, tape: Tape) -> ir.Value:
        """Bool ``[B, S]``: which of the new tokens are no padding."""
        raise NotImplementedError

    def kept_rows(self, tape: Tape, hidden: ir.Value, inputs: dict[str, ir.Value]) -> ir.Value:
        """Rows of `hidden` ``[B, S, H]`` to compute logits for: all (0 to keep), or the last valid ones per row."""
        count, last = inputs["num_logits_to_keep"], self.last_valid(tape)
        zero, one = (tape.initializer(ir.tensor(n, dtype=_INT64, name=f"keep.{n}")) for n in (0, 1))
        axis = tape.initializer(ir.tensor([1], dtype=_INT64, name="keep.axis"))
        final_axis = tape.initializer(ir.tensor([-1], dtype=_INT64, name="keep.final_axis"))
        length = tape.op("Squeeze", [tape.op("Shape", [hidden], {"start": 1, "end": 2})])
        all_rows = tape.op("Equal", [count, zero])
        kept = tape.op("Where", [all_rows, length, tape.op("Min", [count, length])])
        end = tape.op("Where", [all_rows, tape.op("Sub", [length, one]), last])  # [B]
        offsets = tape.op("Sub", [tape.op("Range", [zero, kept, one]), tape.op("Sub", [kept, one])])
        rows = tape.op("Max", [tape.op("Add", [tape.op("Unsqueeze", [end, axis]), offsets]), zero])
        kept_rows = tape.op("GatherND", [hidden, tape.op("Unsqueeze", [rows, final_axis])], {"batch_dims": 1})
        kept_rows.type = hidden.type
        return kept_rows
