"""ONNX Runtime's own operators: GroupQueryAttention with rotary inside, SimplifiedLayerNormalization and its skip form.

Contract of the operators: ONNX Runtime ContribOperators (com.microsoft, opset 1), measured in facts on version 1.31.
GroupQueryAttention assumes right padding: row b's valid length is ``attention_mask[b].sum()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.assemble import AttentionCall, AttentionResult
from vlmexport.lower.onnx.linear import MICROSOFT, LinearEmitter
from vlmexport.lower.onnx.rotary import Rotary


@dataclass
class OrtDialect:
    """The ``gqa`` form of a decoder."""

    rotary: Rotary
    linears: LinearEmitter
    opset: int
    needs_position_ids: bool = False
    packs_qkv: bool = True
    shared: dict[str, ir.Value] = field(default_factory=dict)

    def prologue(self, tape: Tape, inputs: dict[str, ir.Value], past_key: ir.Value) -> None:
        """Lengths from the attention mask, and the rotary tables."""
        axis = tape.initializer(ir.tensor([1], dtype=ir.DataType.INT64, name="mask.axis"))
        one = tape.initializer(ir.tensor([1], dtype=ir.DataType.INT64, name="mask.one"))
        valid = tape.op("ReduceSum", [inputs["attention_mask"], axis], {"keepdims": 0})
        last = tape.op("Sub", [valid, one])
        total = tape.op("Squeeze", [tape.op("Shape", [inputs["attention_mask"]], {"start": 1, "end": 2})])
        length = tape.op("Squeeze", [tape.op("Shape", [inputs["inputs_embeds"]], {"start": 1, "end": 2})])
        zero = tape.initializer(ir.tensor(0, dtype=ir.DataType.INT64, name="mask.zero"))
        past = tape.op("Sub", [total, length])
        self.shared = {
            "seqlens_k": tape.op("Cast", [last], {"to": int(ir.DataType.INT32)}),
            "total": tape.op("Cast", [total], {"to": int(ir.DataType.INT32)}),
            "last_valid": tape.op("Max", [tape.op("Sub", [last, past]), zero]),
            "cos": self.linears.constant("rotary.cos", self.rotary.cos),
            "sin": self.linears.constant("rotary.sin", self.rotary.sin),
        }

    def last_valid(self, tape: Tape) -> ir.Value:
        """Last valid new position of each row; a ragged decode step has only one, index 0."""
        return self.shared["last_valid"]

    def rms_norm(self, tape: Tape, x: ir.Value, weight: ir.Value, epsilon: float) -> tuple[ir.Value, ir.Value | None]:
        """Skip form when `x` is a fresh sum: one kernel adds and norms, and hands the sum on as output 3."""
        add = x.producer()
        if add is None or add.op_type != "Add" or not _same_shape(add):
            attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            return tape.op("SimplifiedLayerNormalization", [x, weight], attributes), None
        outputs = tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [add.inputs[0], add.inputs[1], weight],
            {"epsilon": epsilon},
            domain=MICROSOFT,
            num_outputs=4,
        )
        return outputs[0], outputs[3]

    def attention(self, tape: Tape, call: AttentionCall) -> AttentionResult:
        """One GroupQueryAttention; rotary, causal mask, window and softcap are its attributes."""
        query, key, value = (
            (call.packed, None, None)
            if call.packed is not None
            else (
                _flatten_heads(tape, call.query, call.heads * call.head_dim),
                _flatten_heads(tape, call.key, call.kv_heads * call.head_dim),
                _flatten_heads(tape, call.value, call.kv_heads * call.head_dim),
            )
        )
        shared = self.shared
        lengths = [shared["seqlens_k"], shared["total"], shared["cos"], shared["sin"]]
        outputs = tape.op_multi_out(
            "GroupQueryAttention",
            [query, key, value, call.past_key, call.past_value, *lengths],
            {
                "num_heads": call.heads,
                "kv_num_heads": call.kv_heads,
                "scale": call.scale,
                "softcap": call.softcap,
                "local_window_size": call.window,
                "do_rotary": 1,
                "rotary_interleaved": int(self.rotary.interleaved),
            },
            domain=MICROSOFT,
            num_outputs=3,
        )
        return AttentionResult(outputs[0], outputs[1], outputs[2])


def _same_shape(add: ir.Node) -> bool:
    shapes = [v.shape if v is not None else None for v in add.inputs]
    return all(s is not None and len(s) == 3 for s in shapes) and shapes[0] == shapes[1]


def _flatten_heads(tape: Tape, value: ir.Value, width: int) -> ir.Value:
    """``[B, N, S, D]`` to ``[B, S, N * D]``."""
    shape = tape.initializer(ir.tensor([0, 0, width], dtype=ir.DataType.INT64, name=f"{value.name}.flat_shape"))
    return tape.op("Reshape", [tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]}), shape])
