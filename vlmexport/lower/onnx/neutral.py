"""The neutral operators of a trace: what a decoder layer does, before a dialect says it in a runtime's words.

A traced graph holds these nodes in the domain `DOMAIN` beside standard ONNX operators. They name their weights by the
whole-model parameter name and carry no data, so a trace is small and independent of quantization:

- ``Linear(x) -> y``: attributes `weight`, `bias` (names, ``""`` for none), `in_features`, `out_features`
- ``RMSNorm(x) -> y``: attributes `weight`, `epsilon`, `offset` (1.0 for ``1 + w`` norms)
- ``LayerNorm(x) -> y``: attributes `weight`, `bias` (``""`` for none), `epsilon`
- ``Rotary(x) -> x``: where the rotary embedding of a query or key was taken out of the trace
- ``Attention(q, k, v) -> out``: 4-D ``[batch, heads, sequence, head_dim]`` in, ``[batch, sequence, heads, head_dim]``
  out; attributes `layer`, `scale`, `softcap`, `window`
- ``Rotation(x, cos, sin) -> y``: rotary positions of x ``[batch, heads, sequence, head_dim]`` by tables ``[batch,
  sequence, width]`` that hold every number twice; attributes `interleaved` (pairs are neighbours, not half a width
  apart) and `doubled` (``halves`` or ``neighbours``: where in the tables a number's second place is)
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


def rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, doubled: str) -> torch.Tensor:
    """Emit ``Rotation`` of queries or keys."""
    attrs = {"interleaved": int(interleaved), "doubled": doubled}
    return _symbolic("Rotation", [x, cos, sin], attrs, list(x.shape))


def bracket(x: torch.Tensor, op: str, layer: int) -> torch.Tensor:
    """Emit ``LayerIn`` or ``LayerOut``."""
    return _symbolic(op, [x], {"layer": layer}, list(x.shape))
