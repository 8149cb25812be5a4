"""Lower the decoder part: choose the dialect, trace, assemble, and account for every weight."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.assemble import Dialect, assemble_decoder
from vlmexport.lower.onnx.dialects.ort import OrtDialect
from vlmexport.lower.onnx.dialects.standard import StandardDialect
from vlmexport.lower.onnx.linear import LinearEmitter, LinearRef
from vlmexport.lower.onnx.trace import TracedDecoder, trace_decoder
from vlmexport.model.load import VLM
from vlmexport.plan import ExportPlan
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.names import module_path, weight_names
from vlmexport.split.parts import Part
from vlmexport.target import Target

FLOAT_TYPES = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
# Attention with past and present came to the standard operators with this opset.
_STANDARD_OPSET = 23


@dataclass(frozen=True)
class DecoderGraph:
    """The decoder's graph without its large weights, and the emitter whose groups make them."""

    model: ir.Model
    linears: LinearEmitter


def lower_decoder(vlm: VLM, part: Part, plan: ExportPlan, target: Target, *, repeat: bool = True) -> DecoderGraph:
    """The decoder graph of docs/manifest.md in the dialect that ``plan.options.attention`` names.

    `repeat` False traces every layer instead of one of each kind. Raises `UnsupportedModelError` when the decoder has
    no form in that dialect, or when a weight would be neither in the graph nor in the embedding.
    """
    module = part.module
    if not isinstance(module, DecoderPart):
        raise TypeError(f"the decoder part holds a {type(module).__name__}")
    gqa = plan.options.attention == "gqa"
    traced = trace_decoder(vlm.model, module, fuse_rotary=gqa, repeat=repeat)
    linears = LinearEmitter(
        weight_names(vlm.model, module), plan, FLOAT_TYPES[plan.decoder_dtype], target.onnx.accuracy_level
    )
    head = _head(vlm, module)
    graph = assemble_decoder(
        traced, vlm.facts.kv, vlm.facts.hidden_size, head, _dialect(traced, linears, target), linears
    )
    return DecoderGraph(graph, linears)


def _dialect(traced: TracedDecoder, linears: LinearEmitter, target: Target) -> Dialect:
    if traced.rotary is not None:
        return OrtDialect(traced.rotary, linears, target.onnx.opset)
    return StandardDialect(max(_STANDARD_OPSET, target.onnx.opset))


def _head(vlm: VLM, module: DecoderPart) -> LinearRef:
    from torch import nn

    head = module.head
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the LM head is a {type(head).__name__}, not a linear layer"
        )
    path = module_path(vlm.model, head)
    bias = "" if head.bias is None else f"{path}.bias"
    return LinearRef(f"{path}.weight", bias, head.in_features, head.out_features)
