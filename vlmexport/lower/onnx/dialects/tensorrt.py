"""TensorRT's form of a decoder: standard operators of opset 24, a static cache, norms in float32.

The cache is written by ``TensorScatter``, whose rules in TensorRT (KVCacheUpdate) make it an input and an output of the
graph with a fixed length; attention has one output and takes the mask as booleans. Query i of row b sits in the slot
``write_indices[b] + i`` and sees the slots up to its own, so nothing but the indices has to be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx.dialect import AttentionCall, AttentionResult
from vlmexport.lower.onnx.dialects.blocks import same_block, visible
from vlmexport.lower.onnx.linear import LinearEmitter, cast, dtype_of
from vlmexport.lower.onnx.rotary import Rotary
from vlmexport.lower.onnx.shared_kv import SharedCall
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.lower.onnx.weights import typed_value
from vlmexport.split.masks import BlockMasks

_INT64 = ir.DataType.INT64


@dataclass
class TensorRTDialect:
    """The ``static`` form of a decoder, with a cache of `cache_length` tokens.

    `rotary` None: the rotary embedding is part of the trace, which is given the slots as its positions. Raises
    `BadInputError` for a cache that is longer than the model's rotary table.
    """

    linears: LinearEmitter
    opset: int
    cache_length: int
    rotary: Rotary | None
    blocks: BlockMasks | None = None
    packs_qkv: bool = False
    wide_norms: bool = True
    cache_type: ir.DataType | None = None
    domains: Mapping[str, int] = field(default_factory=dict)
    shared: dict[str, ir.Value] = field(default_factory=dict)
    windows: dict[int, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.cache_length if self.rotary is None else self.rotary.cos.shape[0]
        if self.cache_length > known:
            raise BadInputError(
                f"the cache is to hold {self.cache_length} tokens; the model knows {known} positions; choose --max-seq "
                f"{known} or less"
            )

    @property
    def ir_version(self) -> int:
        """The version that `opset` came with."""
        return ir_version(self.opset)

    @property
    def cache_lengths(self) -> tuple[int | str, int | str]:
        """The same fixed length before and after."""
        return self.cache_length, self.cache_length

    @property
    def needs_position_ids(self) -> bool:
        """True where the rotary embedding is part of the trace."""
        return self.rotary is None

    def inputs(self, kind: ir.DataType, hidden_size: int) -> dict[str, ir.Value]:
        """Embeddings, the slot of each row's first new token, its blocks, and which new tokens get logits."""
        tokens = ["batch_size", "sequence_length"]
        return {
            "inputs_embeds": typed_value("inputs_embeds", kind, [*tokens, hidden_size]),
            "write_indices": typed_value("write_indices", _INT64, ["batch_size"]),
            **({} if self.blocks is None else {"block_ids": typed_value("block_ids", _INT64, tokens)}),
            "logits_positions": typed_value("logits_positions", _INT64, ["batch_size", "kept_length"]),
        }

    def prologue(self, tape: Tape, inputs: dict[str, ir.Value], past_key: ir.Value) -> None:
        """The slots of the new tokens ``[B, S]``, and of the cache ``[C]``; the rotary tables, cut to the cache."""
        zero, one = (tape.initializer(ir.tensor(n, dtype=_INT64, name=f"slots.{n}")) for n in (0, 1))
        column = tape.initializer(ir.tensor([1], dtype=_INT64, name="slots.column"))
        heads = tape.initializer(ir.tensor([1, 3], dtype=_INT64, name="slots.heads"))
        length = tape.op("Squeeze", [tape.op("Shape", [inputs["inputs_embeds"]], {"start": 1, "end": 2})])
        first = tape.op("Unsqueeze", [inputs["write_indices"], column])
        slots = tape.op("Add", [first, tape.op("Range", [zero, length, one])])
        slots.name, slots.type, slots.shape = (
            "slots",
            ir.TensorType(_INT64),
            ir.Shape(["batch_size", "sequence_length"]),
        )
        self.shared = {
            "write_indices": inputs["write_indices"],
            "slots": slots,
            "queries": tape.op("Unsqueeze", [slots, heads]),  # [B, 1, S, 1]
            "keys": tape.initializer(ir.tensor(range(self.cache_length), dtype=_INT64, name="slots.cache")),
        }
        if self.blocks is not None:
            new = inputs["block_ids"]
            self.shared["same"] = same_block(tape, new, self._slot_blocks(tape, new, first, length))
        if self.rotary is not None:
            cos, sin = self.rotary.cos[: self.cache_length], self.rotary.sin[: self.cache_length]
            self.shared["cos"] = self.linears.constant("rotary.cos", cos, ir.DataType.FLOAT)
            self.shared["sin"] = self.linears.constant("rotary.sin", sin, ir.DataType.FLOAT)

    def _slot_blocks(self, tape: Tape, new: ir.Value, first: ir.Value, length: ir.Value) -> ir.Value:
        """Ids ``[B, C]`` of all slots: those of the new tokens ``[B, S]`` from slot `first` ``[B, 1]`` on, else 0."""
        zero, one = (tape.initializer(ir.tensor(n, dtype=_INT64, name=f"blocks.{n}")) for n in (0, 1))
        offsets = tape.op("Sub", [self.shared["keys"], first])
        last = tape.op("Sub", [length, one])
        inside = tape.op("Max", [tape.op("Min", [offsets, last]), zero])
        ids = tape.op("GatherElements", [new, inside], {"axis": 1})
        return tape.op("Where", [tape.op("Equal", [offsets, inside]), ids, zero])

    def positions(self, inputs: dict[str, ir.Value]) -> ir.Value:
        """The slots of the new tokens."""
        return self.shared["slots"]

    def kept_rows(self, tape: Tape, hidden: ir.Value, inputs: dict[str, ir.Value]) -> ir.Value:
        """Rows of `hidden` ``[B, S, H]`` by index."""
        axis = tape.initializer(ir.tensor([-1], dtype=_INT64, name="keep.axis"))
        indices = tape.op("Unsqueeze", [inputs["logits_positions"], axis])
        kept = tape.op("GatherND", [hidden, indices], {"batch_dims": 1})
        kept.type = hidden.type
        return kept

    def last_valid(self, tape: Tape) -> ir.Value:
        """Raises `UnsupportedModelError`: nothing in the static form tells padding from tokens."""
        raise UnsupportedModelError(
            "layers that keep a state (a convolution, linear attention) have no static form; `vlmexport onnx` writes a "
            "form of this model for ONNX Runtime"
        )

    def new_valid(self, tape: Tape) -> ir.Value:
        """As `last_valid`."""
        return self.last_valid(tape)

    def rms_norm(self, tape: Tape, x: ir.Value, weight: ir.Value, epsilon: float) -> tuple[ir.Value, ir.Value | None]:
        """RMSNormalization of float32 values."""
        return tape.op("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon}), None

    def attention(self, tape: Tape, call: AttentionCall) -> AttentionResult:
        """Rotate, write the new keys and values into the cache, and attend to all of it under the mask.

        Raises `UnsupportedModelError` for capped scores, for which TensorRT's Attention has no attribute.
        """
        if call.softcap:
            raise UnsupportedModelError(
                f"attention scores are capped at {call.softcap:g} (softcap), which TensorRT's Attention cannot do; "
                "`vlmexport onnx` writes a form of this model for ONNX Runtime"
            )
        query, key = ((self._rotate(tape, x) if call.rotates else x) for x in (call.query, call.key))
        key = self._write(tape, call.past_key, key)
        value = self._write(tape, call.past_value, call.value)
        out = tape.op("Attention", [query, key, value, self._mask(tape, call.window)], {"scale": call.scale})
        width = call.heads * call.head_dim
        shape = tape.initializer(ir.tensor([0, 0, width], dtype=_INT64, name=f"layers.{call.layer}.attention.shape"))
        flat = tape.op("Reshape", [tape.op("Transpose", [out], {"perm": [0, 2, 1, 3]}), shape])
        return AttentionResult(flat, key, value)

    def shared_attention(self, tape: Tape, call: SharedCall) -> ir.Value:
        """Raises `UnsupportedModelError`: the static form has not been proven for it."""
        raise UnsupportedModelError(
            f"layer {call.layer} of the decoder reads another layer's keys and values, which the static form cannot do "
            "yet; `vlmexport onnx` writes a form of this model for ONNX Runtime"
        )

    def _write(self, tape: Tape, past: ir.Value, new: ir.Value) -> ir.Value:
        return tape.op("TensorScatter", [past, new, self.shared["write_indices"]], {"axis": -2, "mode": "linear"})

    def _rotate(self, tape: Tape, x: ir.Value) -> ir.Value:
        """Rotary positions for x ``[B, N, S, D]``, in float32: in float16 they made a third more error."""
        if self.rotary is None:
            return x
        wide = cast(tape, x, ir.DataType.FLOAT)
        inputs = [wide, self.shared["cos"], self.shared["sin"], self.shared["slots"]]
        turned = tape.op("RotaryEmbedding", inputs, {"interleaved": int(self.rotary.interleaved)})
        turned.type, turned.shape = wide.type, wide.shape
        return cast(tape, turned, dtype_of(x))

    def _mask(self, tape: Tape, window: int) -> ir.Value:
        """Boolean ``[B, 1, S, C]`` for a window (-1: none), made once: True where query i sees slot j."""
        if window not in self.windows:
            keys, queries, width = self.shared["keys"], self.shared["queries"], None
            if window > 0:
                width = tape.initializer(ir.tensor(window, dtype=_INT64, name=f"slots.window.{window}"))
            if self.blocks is not None:
                self.windows[window] = visible(tape, self.blocks, width, queries, keys, self.shared["same"])
                return self.windows[window]
            seen = tape.op("LessOrEqual", [keys, queries])
            if width is not None:
                seen = tape.op("And", [seen, tape.op("Greater", [keys, tape.op("Sub", [queries, width])])])
            self.windows[window] = seen
        return self.windows[window]
