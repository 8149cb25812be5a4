"""Cross-attention of a decoder: neutral in the trace, and with keys, values and masks from the graph's inputs.

What the decoder attends to does not change from token to token, so its keys and values are inputs and never outputs.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import nn

from vlmexport.lower.onnx.linear import cast
from vlmexport.lower.onnx.weights import typed_value
from vlmexport.model.cross import HIDDEN, MISSING, SEEN, STATE_MASK, TILE_MASK, cross_names
from vlmexport.split.cross import CrossAttention

# The trace's input ``[B, S, 1]`` that is 1 for tokens which see any tile.
ROWS = "cross_rows"
_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
_STATES = 2


class PastLength:
    """Stands for a cache in a trace: it keeps nothing and holds so many tokens, as a tensor."""

    is_compileable = False

    def __init__(self, length: torch.Tensor) -> None:
        self.length = length

    def get_seq_length(self, _layer: int = 0) -> torch.Tensor:
        """int64 ``[]``: how many tokens came before."""
        return self.length

    def update(self, key: torch.Tensor, value: torch.Tensor, *_args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they are."""
        return key, value


class CrossTrunk(nn.Module):
    """The traced call of a decoder with cross-attention: its states are zeros that nothing reads.

    Where the decoder counts its positions itself it counts from ``position_ids[0, 0]``: all rows are of one length.
    """

    def __init__(self, decoder: nn.Module, cross: CrossAttention) -> None:
        super().__init__()
        self.decoder, self.cross = decoder, cross

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, cross_rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last hidden state ``[B, S, H]``."""
        given: dict[str, Any] = {
            self.cross.states: inputs_embeds.new_zeros(inputs_embeds.shape[0], _STATES, self.cross.width)
        }
        if cross_rows is not None:
            given |= {"position_ids": position_ids, "full_text_row_masked_out_mask": cross_rows[:, None]}
        else:
            given["past_key_values"] = PastLength(position_ids[0, 0])
            given["attention_mask"] = inputs_embeds.new_zeros(1, 1, 1, 1)  # masks of four axes are taken as they are
        out = self.decoder(inputs_embeds=inputs_embeds, use_cache=False, **given)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden


def trace_rows(cross: CrossAttention) -> dict[str, torch.Tensor]:
    """Further example inputs of the trace, for a batch of two and three tokens."""
    return {ROWS: torch.ones(2, 3, 1)} if cross.tile_tokens else {}


class CrossEmitter:
    """Emits the cross-attentions of one decoder graph; `inputs` are the graph's further inputs, in order."""

    def __init__(self, tape: Tape, cross: CrossAttention, kind: ir.DataType) -> None:
        self.tape, self.cross, self.kind = tape, cross, kind
        tokens = ["batch_size", "sequence_length", "tiles"]
        mask = (
            typed_value(TILE_MASK, _INT64, tokens)
            if cross.tile_tokens
            else typed_value(STATE_MASK, _INT64, ["batch_size", "cross_length"])
        )
        keys = {
            name: typed_value(name, kind, ["batch_size", kept.heads, "cross_length", kept.head_dim])
            for name, kept in cross.names.items()
        }
        self.inputs: dict[str, ir.Value] = {str(mask.name): mask, **keys}
        self.mask: ir.Value = mask

    def prologue(self, embeds: ir.Value) -> tuple[dict[str, ir.Value], dict[str, ir.Value]]:
        """Emit what all layers share; returns the graph's further inputs, and what the trace takes, by name."""
        if self.cross.tile_tokens:
            return self.inputs, self._tiles()
        ones = self._ints("cross.axes", [1, 2])
        valid = self._op("Unsqueeze", [self._op("Cast", [self.mask], {"to": int(_BOOL)}), ones])
        length = self._op("Shape", [embeds], {"start": 1, "end": 2})
        one = self._ints("cross.one", [1])
        self.mask = self._op("Expand", [valid, self._op("Concat", [one, one, length, one], {"axis": 0})])
        return self.inputs, {}

    def _tiles(self) -> dict[str, ir.Value]:
        """The mask of `vlmexport.model.cross.reached_tiles`, bool ``[B, 1, S, T]``."""
        last = self._ints("cross.last", [-1])
        seen, missing = (
            self._op("Equal", [self.mask, self._ints(f"cross.is.{value}", value)]) for value in (SEEN, MISSING)
        )
        nothing = self._ints("cross.nothing", HIDDEN)
        best = self._op("ReduceMax", [self.mask, last], {"keepdims": 1})
        rows = self._op("Greater", [best, nothing])
        none = self._op("Less", [best, nothing])
        there = self._op("Or", [self._op("Not", [missing]), none])
        full = self._op("Or", [seen, self._op("And", [self._op("Not", [rows]), there])])
        wide = self._op(
            "Expand", [self._op("Unsqueeze", [full, last]), self._ints("cross.tile", [self.cross.tile_tokens])]
        )
        flat = self._op("Reshape", [wide, self._ints("cross.flat", [0, 0, -1])])
        self.mask = self._op("Unsqueeze", [flat, self._ints("cross.axis", [1])])
        found = self._op("Cast", [rows], {"to": int(self.kind)})
        found.type = ir.TensorType(self.kind)
        return {ROWS: found}

    def emit(self, node: ir.Node, query: ir.Value, layer: int) -> ir.Value:
        """Attention of `query` ``[B, N, S, D]`` to the states: ``[B, S, N * D]``."""
        keys = [self.inputs[name] for name in cross_names(layer)]
        inputs = [cast(self.tape, query, self.kind), *keys, self.mask]
        out = self._op("Attention", inputs, {"scale": node.attributes["scale"].as_float()})
        shape = self._ints(f"cross.{layer}.flat", [0, 0, -1])
        return self._op("Reshape", [self._op("Transpose", [out], {"perm": [0, 2, 1, 3]}), shape])

    def _op(self, name: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
        return self.tape.op(name, inputs, attributes)

    def _ints(self, name: str, numbers: int | list[int]) -> ir.Value:
        return self.tape.initializer(ir.tensor(numbers, dtype=_INT64, name=name))
