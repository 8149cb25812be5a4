"""The neutral operators of a trace: what a decoder layer does, before a dialect says it in a runtime's words.

A traced graph holds these nodes in the domain `DOMAIN` beside standard ONNX operators. They name their weights by the
whole-model parameter name and carry no data, so a trace is small and independent of quantization:

- ``Linear(x) -> y``: attributes `weight`, `bias` (names, ``""`` for none), `in_features`, `out_features`
- ``RMSNorm(x) -> y``: attributes `weight` (``""`` for ones), `epsilon`, `offset` (1.0 for ``1 + w`` norms)
- ``LayerNorm(x) -> y``: attributes `weight`, `bias` (``""`` for none), `epsilon`
- ``Rotary(x) -> x``: where the rotary embedding of a query or key was taken out of the trace
- ``Attention(q, k, v) -> out``: 4-D ``[batch, heads, sequence, head_dim]`` in, ``[batch, sequence, heads, head_dim]``
  out; attributes `layer`, `scale`, `softcap`, `window`
- ``CrossAttention(q) -> out``: shapes as of ``Attention``; keys and values are inputs of the graph. Attributes `layer`,
  `scale`
- ``Rotation(x, cos, sin) -> y``: rotary positions of x ``[batch, heads, sequence, head_dim]`` by tables ``[batch,
  sequence, width]`` that hold every number twice; attributes `interleaved` (pairs are neighbours, not half a width
  apart) and `doubled` (``halves`` or ``neighbours``: where in the tables a number's second place is)
- ``ConvState(x) -> y``: inputs ``[batch, channels, sequence]`` of a causal convolution behind the last `kernel` ones
  before them, ``[batch, channels, kernel + sequence]``; attributes `layer`, `kernel`
- ``DeltaRule(q, k, v, g, beta) -> out``: linear attention by the gated delta rule, see `states.delta_rule`; attributes
  `layer`, `scale`, `normalized`
- ``ExpertIn(rows, chosen, weights) -> x`` (or ``ExpertIn(rows)``, all experts' rows one after the other): the rows of
  one expert; attribute `experts`, their number. What lies between it and ``ExpertOut`` is done for every expert
- ``ExpertLinear(x) -> y``: a product with one expert's matrix; attributes `weight` (of the packed parameter),
  `in_features`, `out_features`
- ``ExpertOut(y, rows, chosen, weights) -> out`` (or ``ExpertOut(y, rows)``): the experts' results back in the order of
  `rows`, weighted and added where each row went to several
- ``SharedAttention(q) -> out``: ``Attention`` over the cache of layer `source` as it is after the new tokens;
  attributes `layer`, `source`, `kv_heads`, `scale`, `softcap`, `window`
- ``LayerRows(rows, hidden) -> x``: of ``rows [batch, sequence, layers, width]`` what belongs to the decoder layer that
  `hidden` is in
- ``LayerIn(x) -> x``, ``LayerOut(x) -> x``: brackets around decoder layer `layer`
"""

from __future__ import annotations

from typing import Any

import torch

DOMAIN = "vlmexport"


def _symbolic(op: str, inputs: list[torch.Tensor], attrs: dict[str, Any], shape: list[Any]) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{op}", inputs, attrs, dtype=inputs[0].dtype, shape=shape, version=1)


def linear(x: torch.Tensor, weight: str, bias: str, in_features: int, out_features: int) -> torch.Tensor:
    """Emit ``Linear``; x is ``[..., in_features]``, the result ``[..., out_features]``."""
    attrs = {"weight": weight, "bias": bias, "in_features": in_features, "out_features": out_features}
    return _symbolic("Linear", [x], attrs, [*x.shape[:-1], out_features])


def rms_norm(x: torch.Tensor, weight: str, epsilon: float, offset: float) -> torch.Tensor:
    """Emit ``RMSNorm`` over the last axis."""
    return _symbolic("RMSNorm", [x], {"weight": weight, "epsilon": epsilon, "offset": offset}, list(x.shape))


def layer_norm(x: torch.Tensor, weight: str, bias: str, epsilon: float) -> torch.Tensor:
    """Emit ``LayerNorm`` over the last axis."""
    return _symbolic("LayerNorm", [x], {"weight": weight, "bias": bias, "epsilon": epsilon}, list(x.shape))


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Emit ``Rotary`` for a query or key ``[batch, heads, sequence, head_dim]``."""
    return _symbolic("Rotary", [x], {}, list(x.shape))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float, softcap: float, window: int
) -> torch.Tensor:
    """Emit ``Attention`` of one layer; the cache and the mask are added when a dialect lowers it."""
    batch, heads, length, head_dim = query.shape
    attrs = {"layer": layer, "scale": scale, "softcap": softcap, "window": window}
    return _symbolic("Attention", [query, key, value], attrs, [batch, length, heads, head_dim])


def shared_attention(query: torch.Tensor, **attributes: int | float) -> torch.Tensor:
    """Emit ``SharedAttention`` of one layer for queries ``[batch, heads, sequence, head_dim]``."""
    batch, heads, length, head_dim = query.shape
    return _symbolic("SharedAttention", [query], dict(attributes), [batch, length, heads, head_dim])


def layer_rows(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Emit ``LayerRows`` inside the layer that `hidden` belongs to."""
    batch, length, _, width = rows.shape
    return _symbolic("LayerRows", [rows, hidden], {}, [batch, length, width])


def cross_attention(query: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
    """Emit ``CrossAttention`` of one layer for queries ``[batch, heads, sequence, head_dim]``."""
    batch, heads, length, head_dim = query.shape
    attrs = {"layer": layer, "scale": scale}
    return _symbolic("CrossAttention", [query], attrs, [batch, length, heads, head_dim])


def rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, doubled: str) -> torch.Tensor:
    """Emit ``Rotation`` of queries or keys."""
    attrs = {"interleaved": int(interleaved), "doubled": doubled}
    return _symbolic("Rotation", [x, cos, sin], attrs, list(x.shape))


def conv_state(x: torch.Tensor, layer: int, kernel: int) -> torch.Tensor:
    """Emit ``ConvState`` for the new inputs ``[batch, channels, sequence]`` of a convolution."""
    batch, channels, length = x.shape
    return _symbolic("ConvState", [x], {"layer": layer, "kernel": kernel}, [batch, channels, length + kernel])


def delta_rule(tensors: list[torch.Tensor], layer: int, scale: float, normalized: bool) -> torch.Tensor:
    """Emit ``DeltaRule`` of one layer; the state and the padding are added when it is assembled."""
    attrs = {"layer": layer, "scale": scale, "normalized": int(normalized)}
    return _symbolic("DeltaRule", tensors, attrs, list(tensors[2].shape))


def expert_in(given: list[torch.Tensor], experts: int) -> torch.Tensor:
    """Emit ``ExpertIn``; the number of rows of one expert is not known, that of all stands for it."""
    return _symbolic("ExpertIn", given, {"experts": experts}, list(given[0].shape))


def expert_linear(x: torch.Tensor, weight: str, in_features: int, out_features: int) -> torch.Tensor:
    """Emit ``ExpertLinear``; x is ``[rows, in_features]``."""
    attrs = {"weight": weight, "in_features": in_features, "out_features": out_features}
    return _symbolic("ExpertLinear", [x], attrs, [*x.shape[:-1], out_features])


def expert_out(y: torch.Tensor, given: list[torch.Tensor], experts: int) -> torch.Tensor:
    """Emit ``ExpertOut`` for what was `given` to ``ExpertIn``."""
    return _symbolic("ExpertOut", [y, *given], {"experts": experts}, [*given[0].shape[:-1], y.shape[-1]])


def bracket(x: torch.Tensor, op: str, layer: int) -> torch.Tensor:
    """Emit ``LayerIn`` or ``LayerOut``."""
    return _symbolic(op, [x], {"layer": layer}, list(x.shape))
