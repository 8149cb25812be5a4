"""ONNX Runtime's own operators: GroupQueryAttention with rotary inside, SimplifiedLayerNormalization and its skip form.

Contract of the operators: ONNX Runtime ContribOperators (com.microsoft, opset 1), measured in facts on version 1.31.
GroupQueryAttention assumes right padding: row b's valid length is ``attention_mask[b].sum()``. With an INT8 cache it
quantizes every new key (after rotary) and value with the given scales and attends to the quantized ones, the new ones
included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.dialect import AttentionCall, AttentionResult
from vlmexport.lower.onnx.dialects.blocks import behind_past, same_block, visible
from vlmexport.lower.onnx.dialects.growing import GrowingCache
from vlmexport.lower.onnx.linear import MICROSOFT, LinearEmitter
from vlmexport.lower.onnx.rotary import Rotary, RotaryInTrace, RotaryOperator
from vlmexport.lower.onnx.shared_kv import SharedCall, no_keys
from vlmexport.quantize.kv_cache import CachePeaks
from vlmexport.split.masks import BlockMasks


@dataclass
class OrtDialect(GrowingCache):
    """The ``gqa`` form of a decoder.

    With `cache_peaks` the cache is INT8; `cache_scales` holds the scales (keys, values) of the layers emitted so far.
    With `blocks` the operator applies no mask of its own: all of it (causal, window, padding) is in its bias, which is
    made once for each window.
    """

    rotary: Rotary | RotaryOperator | RotaryInTrace
    linears: LinearEmitter
    opset: int
    cache_peaks: CachePeaks | None = None
    blocks: BlockMasks | None = None
    packs_qkv: bool = True
    shared: dict[str, ir.Value] = field(default_factory=dict)
    biases: dict[int, ir.Value] = field(default_factory=dict)
    cache_scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def needs_position_ids(self) -> bool:
        """True where the rotation is not part of attention: something else computes with positions."""
        return not isinstance(self.rotary, Rotary)

    @property
    def cache_type(self) -> ir.DataType | None:
        """INT8 for a quantized cache."""
        return None if self.cache_peaks is None else ir.DataType.INT8

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
            "length": length,
        }
        if isinstance(self.rotary, Rotary):
            self.shared["cos"] = self.linears.constant("rotary.cos", self.rotary.cos)
            self.shared["sin"] = self.linears.constant("rotary.sin", self.rotary.sin)
        if self.blocks is not None:
            self._blocks(tape, inputs["block_ids"], (valid, last), (zero, past, length, total))

    def _blocks(
        self,
        tape: Tape,
        new: ir.Value,
        rows_ends: tuple[ir.Value, ir.Value],
        sizes: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    ) -> None:
        """Slots of queries ``[B, 1, S, 1]`` and keys ``[T]``, which keys are valid, and which share a block.

        A row's new tokens sit behind its own valid ones, or from slot 0 in a first call, where they are counted among
        them. Padding counts as the row's last valid token: a query that sees nothing at all would give NaN.
        """
        (valid, last), (zero, past, length, total) = rows_ends, sizes
        one = tape.initializer(ir.tensor(1, dtype=ir.DataType.INT64, name="slots.1"))
        heads = tape.initializer(ir.tensor([1, 3], dtype=ir.DataType.INT64, name="slots.heads"))
        rows = tape.initializer(ir.tensor([1, 2, 3], dtype=ir.DataType.INT64, name="slots.rows"))
        column = tape.initializer(ir.tensor([1], dtype=ir.DataType.INT64, name="slots.column"))
        keys = tape.op("Range", [zero, total, one])
        first = tape.op("Max", [tape.op("Sub", [valid, length]), zero])
        slots = tape.op("Add", [tape.op("Unsqueeze", [first, column]), tape.op("Range", [zero, length, one])])
        slots = tape.op("Min", [slots, tape.op("Unsqueeze", [last, column])])
        self.shared |= {
            "keys": keys,
            "queries": tape.op("Unsqueeze", [slots, heads]),
            "valid": tape.op("Less", [keys, tape.op("Unsqueeze", [valid, rows])]),
            "same": same_block(tape, new, behind_past(tape, new, past)),
        }

    def last_valid(self, tape: Tape) -> ir.Value:
        """Last valid new position of each row; a ragged decode step has only one, index 0."""
        return self.shared["last_valid"]

    def new_valid(self, tape: Tape) -> ir.Value:
        """Everything up to a row's last valid new token: padding is on the right."""
        zero, one = (tape.initializer(ir.tensor(n, dtype=ir.DataType.INT64, name=f"new.{n}")) for n in (0, 1))
        axis = tape.initializer(ir.tensor([1], dtype=ir.DataType.INT64, name="new.axis"))
        places = tape.op("Range", [zero, self.shared["length"], one])
        return tape.op("LessOrEqual", [places, tape.op("Unsqueeze", [self.shared["last_valid"], axis])])

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
        tables = [shared["cos"], shared["sin"]] if call.rotates else [None, None]
        lengths = [shared["seqlens_k"], shared["total"], *tables]
        scales, cache = self._cache(call)
        inputs, masking = [*lengths, *scales], {"local_window_size": call.window}
        if self.blocks is not None:
            inputs = [*lengths, None, self._bias(tape, call.window), *scales[2:]]
            masking = {"causal": 0}
        outputs = tape.op_multi_out(
            "GroupQueryAttention",
            [query, key, value, call.past_key, call.past_value, *inputs],
            {
                "num_heads": call.heads,
                "kv_num_heads": call.kv_heads,
                "scale": call.scale,
                "softcap": call.softcap,
                **masking,
                "do_rotary": int(call.rotates),
                "rotary_interleaved": int(self.rotary.interleaved),
                **cache,
            },
            domain=MICROSOFT,
            num_outputs=3,
        )
        return AttentionResult(outputs[0], outputs[1], outputs[2])

    def shared_attention(self, tape: Tape, call: SharedCall) -> ir.Value:
        """GroupQueryAttention whose past is the other layer's cache, without new keys and without an own cache."""
        width, shared = call.kv_heads * call.head_dim, self.shared
        query = _flatten_heads(tape, call.query, call.heads * call.head_dim)
        none = no_keys(tape, call.query, width)
        lengths = [shared["seqlens_k"], shared["total"]]
        bias: list[ir.Value | None] = []
        masking = {"local_window_size": call.window}
        if self.blocks is not None:
            bias, masking = [None, None, None, self._bias(tape, call.window)], {"causal": 0}
        settings = {"num_heads": call.heads, "kv_num_heads": call.kv_heads, **masking}
        return tape.op(
            "GroupQueryAttention",
            [query, none, none, call.key, call.value, *lengths, *bias],
            {**settings, "scale": call.scale, "softcap": call.softcap},
            domain=MICROSOFT,
        )

    def _bias(self, tape: Tape, window: int) -> ir.Value:
        """Attention bias ``[B, 1, S, T]`` of the activation type for a window (-1: none), made once."""
        if self.blocks is not None and window not in self.biases:
            kind, shared = self.linears.float_type, self.shared
            width = None
            if window > 0:
                width = tape.initializer(ir.tensor(window, dtype=ir.DataType.INT64, name=f"slots.window.{window}"))
            seen = visible(tape, self.blocks, width, shared["queries"], shared["keys"], shared["same"])
            if "shown" not in shared:
                shared["shown"] = tape.initializer(ir.tensor(0.0, dtype=kind, name="bias.shown"))
                shared["hidden"] = tape.initializer(ir.tensor(float("-inf"), dtype=kind, name="bias.hidden"))
            seen = tape.op("And", [seen, shared["valid"]])
            self.biases[window] = tape.op("Where", [seen, shared["shown"], shared["hidden"]])
        return self.biases[window]

    def _cache(self, call: AttentionCall) -> tuple[list[ir.Value | None], dict[str, int | str]]:
        """Inputs 9 to 13 and the attributes of a quantized cache; nothing for a cache of floats."""
        if self.cache_peaks is None:
            return [], {}
        if isinstance(self.rotary, RotaryInTrace):
            raise UnsupportedModelError(
                "--kv-cache int8: this decoder's keys are turned by its own code or not at all, so which channels "
                "share a scale is not known; choose --kv-cache same"
            )
        if self._folded_rows(call.key_weight) is not None:
            raise ValueError(f"{call.key_weight}: a fold scales keys that are cached after rotary embedding")
        scaled = [name for name in call.value_makers if self._folded_rows(name) is not None]
        if call.value_weight is None and scaled:
            raise UnsupportedModelError(
                f"--kv-cache int8: calibration scaled rows of {scaled[0]}, of which the values are a part, so their "
                "range is not known; choose --quant gptq (which moves no scales) or --kv-cache same"
            )
        peaks = self.cache_peaks.layers[call.layer]
        scales = peaks.key_scale(self.rotary.interleaved), peaks.value_scale(self._folded_rows(call.value_weight))
        self.cache_scales[call.layer] = scales
        made = [
            self.linears.constant(f"kv_cache.{call.layer}.{kind}_scale", scale, ir.DataType.FLOAT)
            for kind, scale in zip(("key", "value"), scales, strict=True)
        ]
        attributes: dict[str, int | str] = {
            "kv_cache_bit_width": 8,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
        }
        return [None, None, None, *made], attributes

    def _folded_rows(self, weight: str | None) -> torch.Tensor | None:
        fold = self.linears.weights.folds.get(weight) if weight is not None else None
        return None if fold is None else fold.rows


def _same_shape(add: ir.Node) -> bool:
    shapes = [v.shape if v is not None else None for v in add.inputs]
    return all(s is not None and len(s) == 3 for s in shapes) and shapes[0] == shapes[1]


def _producer(value: ir.Value | None, op: str) -> ir.Value | None:
    """The first input of the `op` node that makes `value`; None when something else makes it."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == op else None


def _flatten_heads(tape: Tape, value: ir.Value, width: int) -> ir.Value:
    """``[B, N, S, D]`` to ``[B, S, N * D]``: what was split into heads just before is taken as it was."""
    split = _producer(_producer(value, "Transpose"), "Reshape")
    if split is not None and split.shape is not None and len(split.shape) == 3 and split.shape[2] == width:
        return split
    shape = tape.initializer(ir.tensor([0, 0, width], dtype=ir.DataType.INT64, name=f"{value.name}.flat_shape"))
    return tape.op("Reshape", [tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]}), shape])
