"""What a dialect is: the words of one runtime for the neutral operators, and what the assembler tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.relative import AddedLookup
from vlmexport.lower.onnx.shared_kv import SharedCall


@dataclass(frozen=True)
class AttentionCall:
    """One attention of the graph under construction: inputs ``[B, heads, S, head_dim]`` and its settings.

    `rotates`: rotary positions were taken out of the trace of this layer and are still to be applied.
    `chunk`: tokens see those of their own chunk of so many tokens alone (0: all).
    `packed` is set when q, k and v come straight from linears on one input: their stacked product ``[B, S, (N+2K)*D]``.
    `key_weight` and `value_weight` name the linear that k and v come straight from (None: something is in between),
    `value_makers` all linears that v depends on through no other linear. `added`: what its scores get by the distance
    of query and key.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    packed: ir.Value | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int
    past_key: ir.Value
    past_value: ir.Value
    rotates: bool = True
    layer: int = 0
    key_weight: str | None = None
    value_weight: str | None = None
    value_makers: tuple[str, ...] = ()
    added: AddedLookup | None = None
    chunk: int = 0


@dataclass(frozen=True)
class AttentionResult:
    """Attention output as ``[B, S, N * D]``, and the cache after it."""

    output: ir.Value
    present_key: ir.Value
    present_value: ir.Value


class Dialect(Protocol):
    """The operators of one runtime, and the inputs and outputs of its decoders (docs/manifest.md).

    `domains` are those of its operators beside the standard ones, with their versions. `cache_lengths` are axis 2 of
    the cache before and after a call; `wide_norms` says that norms compute in float32 and have weights of that type.
    """

    opset: int
    packs_qkv: bool

    @property
    def ir_version(self) -> int:
        """Version of the file format that the operators need."""
        ...

    @property
    def domains(self) -> Mapping[str, int]:
        """See above."""
        ...

    @property
    def cache_lengths(self) -> tuple[int | str, int | str]:
        """See above."""
        ...

    @property
    def wide_norms(self) -> bool:
        """See above."""
        ...

    @property
    def needs_position_ids(self) -> bool:
        """True where the trace computes with positions: the rotary embedding is part of it."""
        ...

    @property
    def cache_type(self) -> ir.DataType | None:
        """Type of the cache's values; None for the activation type."""
        ...

    def inputs(self, kind: ir.DataType, hidden_size: int) -> dict[str, ir.Value]:
        """The graph's inputs but for the cache, in order; ``inputs_embeds [B, S, H]`` of the type `kind` is one."""
        ...

    def prologue(self, tape: Tape, inputs: dict[str, ir.Value], past_key: ir.Value) -> None:
        """Emit what all layers share (lengths, masks, tables)."""
        ...

    def positions(self, inputs: dict[str, ir.Value]) -> ir.Value:
        """int64 ``[B, S]``: the positions that the trace takes. After the prologue."""
        ...

    def last_valid(self, tape: Tape) -> ir.Value:
        """int64 ``[B]``: index, among the new tokens, of each row's last one that is no padding. After the prologue."""
        ...

    def new_valid(self, tape: Tape) -> ir.Value:
        """Bool ``[B, S]``: which of the new tokens are no padding. After the prologue."""
        ...

    def kept_rows(self, tape: Tape, hidden: ir.Value, inputs: dict[str, ir.Value]) -> ir.Value:
        """The rows of the last hidden state ``[B, S, H]`` to compute logits for."""
        ...

    def rms_norm(self, tape: Tape, x: ir.Value, weight: ir.Value, epsilon: float) -> tuple[ir.Value, ir.Value | None]:
        """The normed value, and the value that now stands for `x` when the operator also recomputed it."""
        ...

    def attention(self, tape: Tape, call: AttentionCall) -> AttentionResult:
        """Attention over past and new positions."""
        ...

    def shared_attention(self, tape: Tape, call: SharedCall) -> ir.Value:
        """Attention over the cache of an earlier layer, as ``[B, S, N * D]``."""
        ...
