"""Lower the part that makes the keys and values of what a decoder attends to beside its tokens."""

from __future__ import annotations

import dataclasses

from torch import nn

from vlmexport.lower.onnx.encoder import VisionGraph, lower_vision
from vlmexport.lower.onnx.precision import EncoderPrecision
from vlmexport.plan import ONCE, ExportPlan
from vlmexport.split.parts import Part
from vlmexport.target import Target


def lower_states(model: nn.Module, part: Part, plan: ExportPlan, target: Target) -> VisionGraph:
    """The graph of `part`, its weights as the decoder stores what it does not quantize.

    Raises `UnsupportedModelError` when it cannot be traced.
    """
    precision = EncoderPrecision(plan.decoder_dtype, target.onnx.encoder_arithmetic)
    graph = lower_vision(model, part, precision, target.onnx.opset)
    same = f"--decoder-dtype {plan.decoder_dtype}"
    kept = tuple(
        k
        if plan.decoder_dtype == "fp16" and k.dtype == "float32"
        else dataclasses.replace(k, reason=f"{ONCE} ({same})")
        for k in graph.kept
    )
    return dataclasses.replace(graph, kept=kept)
