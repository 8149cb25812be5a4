"""Attention of an image encoder as the standard operator: first a neutral node of the trace, then ``Attention``.

Queries, keys and values go in as FP16, which is what the GPU's fused kernels take (they sum and take the softmax in
FP32), but for layers whose values or scores come near FP16's range or lose much to it on the part's own examples.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.precision import FP16_MAX
from vlmexport.split.attention import attention_implementation, refuse_changed_scores
from vlmexport.split.parts import Part

_NEUTRAL = "ImageAttention"
_FLOAT, _HALF, _BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BOOL
# What the examples show is not the largest that users will see.
_SAFE = FP16_MAX / 16
# Rounding to FP16 alone costs 5e-4 of each value.
_ROUNDING = 2e-3


def neutral_attention(model: nn.Module, encoder: Any) -> AbstractContextManager[None]:
    """Within, attention of the encoder of `model` emits one neutral node a layer, which names the layer's module."""
    paths = {module: path for path, module in model.named_modules()}

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return _attend(module, paths[module], *args, **kwargs)

    return attention_implementation(encoder, "vlmexport_image", attend)


def _attend(
    module: nn.Module,
    path: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Emit the node for q ``[B, N, S, D]`` and k, v ``[B, M, S, D]``; the result is ``[B, S, N, D]``."""
    if attention_mask is None and (kwargs.get("is_causal") or getattr(module, "is_causal", False)):
        raise UnsupportedModelError(f"{type(module).__name__}: causal attention in an image encoder is not supported")
    refuse_changed_scores(module, kwargs)
    inputs = [query, key, value] if attention_mask is None else [query, key, value, attention_mask]
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_NEUTRAL}",
        inputs,
        {"scale": _scale(query, kwargs), "module": path},
        dtype=query.dtype,
        shape=[*query.shape[:3], value.shape[3]],
        version=1,
    )
    return out.transpose(1, 2), None


def _scale(query: torch.Tensor, kwargs: dict[str, Any]) -> float:
    scale = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def standard_attention(graph: ir.Graph, model: nn.Module, encoder: Any, part: Part, *, half: bool) -> None:
    """Turn every neutral node into a standard ``Attention``, in FP16 where `half` and `exact_in_half` allow it."""
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == _NEUTRAL]
    exact = exact_in_half(model, encoder, part) if nodes and half else frozenset[str]()
    masks: dict[tuple[ir.Value, bool], ir.Value] = {}
    for node in nodes:
        _replace(graph, node, masks, node.attributes["module"].as_string() in exact)


def _replace(graph: ir.Graph, node: ir.Node, masks: dict[tuple[ir.Value, bool], ir.Value], narrow: bool) -> None:
    kind, out = (_HALF if narrow else _FLOAT), node.outputs[0]
    inputs = [_cast(graph, node, value, kind) for value in node.inputs[:3] if value is not None]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        key = (node.inputs[3], narrow)
        if key not in masks:
            masks[key] = _mask(graph, node, node.inputs[3], kind)
        inputs.append(masks[key])
    attention = ir.node("Attention", inputs, {"scale": node.attributes["scale"].as_float()})
    attention.outputs[0].type = ir.TensorType(kind)
    graph.insert_before(node, attention)
    ir.convenience.replace_all_uses_with(out, _cast(graph, node, attention.outputs[0], _FLOAT))
    graph.remove(node, safe=True)


def _mask(graph: ir.Graph, place: ir.Node, mask: ir.Value, kind: ir.DataType) -> ir.Value:
    """The mask as the operator takes it: booleans where it is made of them, else a bias of the type `kind`."""
    where = mask.producer()
    if where is not None and where.op_type == "Where" and _is(where.inputs[1], 0.0, 0.0):
        hidden = where.inputs[0]
        if hidden is not None and _is(where.inputs[2], -float("inf"), -FP16_MAX):
            return hidden
    if mask.dtype == _BOOL or kind == _FLOAT:
        return mask
    limits = [_scalar(graph, f"attention.{name}", value) for name, value in (("low", -FP16_MAX), ("high", FP16_MAX))]
    clip = ir.node("Clip", [mask, *limits])
    clip.outputs[0].type = ir.TensorType(_FLOAT)
    graph.insert_before(place, clip)
    return _cast(graph, place, clip.outputs[0], kind)


def _is(value: ir.Value | None, low: float, high: float) -> bool:
    """True for a constant whose elements are all from `low` to `high`."""
    constant = None if value is None else value.const_value
    return constant is not None and bool(((constant.numpy() >= low) & (constant.numpy() <= high)).all())


def _scalar(graph: ir.Graph, name: str, number: float) -> ir.Value:
    if name not in graph.initializers:
        constant = ir.tensor(number, dtype=_FLOAT)
        value = ir.Value(name=name, type=ir.TensorType(_FLOAT), shape=ir.Shape([]), const_value=constant)
        graph.register_initializer(value)
    return graph.initializers[name]


def _cast(graph: ir.Graph, place: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
    if value.dtype == kind:
        return value
    cast = ir.node("Cast", [value], {"to": int(kind)})
    cast.outputs[0].type = ir.TensorType(kind)
    graph.insert_before(place, cast)
    return cast.outputs[0]


def exact_in_half(model: nn.Module, encoder: Any, part: Part) -> frozenset[str]:
    """Paths of the attention modules of which FP16 queries, keys and values are as good as FP32 on `part`'s examples.

    They are when neither they nor the scores exceed a sixteenth of FP16's range, and the result of the rounded ones
    differs by no more than `_ROUNDING` of its largest value.
    """
    watch = _Watch()
    with attention_implementation(encoder, "vlmexport_image_look", watch.attend), torch.no_grad():
        for example in part.examples:
            part.module(**example)
    return frozenset(path for path, module in model.named_modules() if watch.exact.get(module, False))


@dataclass
class _Watch:
    """Computes attention as transformers does, and notes of each module whether FP16 would always do."""

    exact: dict[nn.Module, bool] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Result ``[B, S, N, D]`` of q ``[B, N, S, D]`` and k, v ``[B, M, S, D]``."""
        batch, heads, length, _ = query.shape
        groups, scale = heads // key.shape[1], _scale(query, kwargs)
        out = torch.empty(batch, length, heads, value.shape[3])
        peak, error = 0.0, 0.0
        # One head of one picture at a time: all their scores together can be gigabytes.
        for b, n in itertools.product(range(batch), range(heads)):
            wide = [query[b, n].float(), key[b, n // groups].float(), value[b, n // groups].float()]
            bias = 0.0 if attention_mask is None else attention_mask.expand(batch, heads, -1, -1)[b, n].float()
            out[b, :, n], scores = _attention(wide, bias, scale)
            rounded, _ = _attention([t.half().float() for t in wide], bias, scale)
            peak = max(peak, *(float(t.abs().max()) for t in (*wide, scores)))
            error = max(error, float((rounded - out[b, :, n]).abs().max()))
        narrow = peak <= _SAFE and error <= _ROUNDING * float(out.abs().max())
        self.exact[module] = narrow and self.exact.get(module, True)
        return out.to(query.dtype), None


def _attention(qkv: list[torch.Tensor], bias: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and scores, before the bias, of one head."""
    scores = qkv[0] @ qkv[1].t() * scale
    return (scores + bias).softmax(dim=-1) @ qkv[2], scores
