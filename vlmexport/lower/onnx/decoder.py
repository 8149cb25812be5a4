"""Lower the decoder part: choose the dialect, trace, assemble, and account for every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx.assemble import assemble_decoder
from vlmexport.lower.onnx.dialect import Dialect
from vlmexport.lower.onnx.dialects.ort import OrtDialect
from vlmexport.lower.onnx.dialects.standard import StandardDialect
from vlmexport.lower.onnx.dialects.tensorrt import TensorRTDialect
from vlmexport.lower.onnx.dq import DequantizeEmitter
from vlmexport.lower.onnx.expert_trace import ExpertPeaks
from vlmexport.lower.onnx.linear import LinearEmitter, LinearRef
from vlmexport.lower.onnx.logit_mask import hide_tokens, scale_logits
from vlmexport.lower.onnx.retrieval import embeddings_only
from vlmexport.lower.onnx.rotary import RotaryInTrace, RotaryOperator, probe_rotary
from vlmexport.lower.onnx.trace import TracedDecoder, trace_decoder
from vlmexport.model.load import VLM
from vlmexport.plan import ExportPlan
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.expert_forms import find_expert_forms, transposed_parameters
from vlmexport.split.layers import find_layers
from vlmexport.split.masks import BlockMasks
from vlmexport.split.matrices import is_plain_linear
from vlmexport.split.names import module_path
from vlmexport.split.parts import Part
from vlmexport.target import Target

FLOAT_TYPES = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
# A sixteenth of the largest float16: what the examples show is not the largest that users will see.
FP16_SAFE = 65504 / 16
# Attention with past and present, and rotation by tables, came to the standard operators with this opset.
_STANDARD_OPSET = 23


@dataclass(frozen=True)
class DecoderGraph:
    """The decoder's graph without its large weights, and the emitter whose groups make them.

    `traced` is what it was assembled from.
    `cache_scales` are those of an INT8 cache, in the order of `scales_digest`; empty for a cache of floats.
    """

    model: ir.Model
    linears: LinearEmitter
    traced: TracedDecoder
    cache_scales: tuple[torch.Tensor, ...] = ()


def lower_decoder(
    vlm: VLM,
    part: Part,
    plan: ExportPlan,
    target: Target,
    weights: DecoderWeights,
    *,
    repeat: bool = True,
    traced: TracedDecoder | None = None,
) -> DecoderGraph:
    """The decoder graph of docs/manifest.md in the dialect that ``plan.options.attention`` names.

    `weights` gives the codes and floats to store.
    `repeat` False traces every layer instead of one of each kind; `traced` is the trace of an earlier call for the same
    form of attention. Raises `UnsupportedModelError` when the decoder has
    no form in that dialect, or when a weight would be neither in the graph nor in the embedding.
    """
    module = part.module
    if not isinstance(module, DecoderPart):
        raise TypeError(f"the decoder part holds a {type(module).__name__}")
    if target.onnx.dialect == "tensorrt" and (module.position_axes > 1 or module.deepstack_layers):
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: its decoder takes positions on {module.position_axes} axes and features for "
            f"{module.deepstack_layers} early layers, which the tensorrt layout does not have yet; `vlmexport onnx` "
            "writes a form of this model for ONNX Runtime"
        )
    if traced is None:
        traced = trace_decoder(vlm.model, module, fuse_rotary=_fuses_rotary(plan, module), repeat=repeat)
    kind = FLOAT_TYPES[plan.decoder_dtype]
    turned = transposed_parameters(vlm.model, find_expert_forms(module.decoder))
    weights = dataclasses.replace(weights, transposed=turned)
    wide = frozenset[str]() if kind == ir.DataType.FLOAT else wide_linears(vlm, part, weights)
    emitter = DequantizeEmitter if target.onnx.dialect == "tensorrt" else LinearEmitter
    linears = emitter(weights, plan, kind, target.onnx.accuracy_level, wide)
    head = lm_head(vlm, module)
    dialect = choose_dialect(traced, linears, target, module.blocks)
    cap = module.logit_cap
    graph = assemble_decoder(traced, module.kv or vlm.facts.kv, vlm.facts.hidden_size, head, dialect, linears, cap)
    scale_logits(graph, module.logit_scale)
    hide_tokens(graph, module.hidden_tokens)
    if vlm.facts.output == "embeddings":
        embeddings_only(graph)
    return DecoderGraph(graph, linears, traced, _cache_scales(dialect))


def _fuses_rotary(plan: ExportPlan, module: DecoderPart) -> bool:
    """Does an attention operator or one beside it rotate? GQA has to; the static form keeps what has no such form."""
    if plan.options.attention != "static":
        return plan.options.attention == "gqa"
    try:
        probe_rotary(module.decoder, find_layers(module.decoder)[1][0])
    except UnsupportedModelError:
        return False
    return True


def wide_linears(vlm: VLM, part: Part, weights: DecoderWeights) -> frozenset[str]:
    """Weights of decoder linears whose output on the part's examples comes near the range of float16.

    Outputs are those of the stored weights: a fold that scales a linear's rows scales them too.
    """
    peaks: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
            rows = weights.folds[name].rows if name in weights.folds else None
            peaks[name] = max(peaks.get(name, 0.0), float((out if rows is None else out * rows).abs().max()))

        return keep

    linears = [m for m in part.module.modules() if is_plain_linear(m)]
    handles = [m.register_forward_hook(watch(f"{module_path(vlm.model, m)}.weight")) for m in linears]
    experts = ExpertPeaks(weights.folds, peaks)
    try:
        with torch.no_grad(), experts.watched(vlm.model, part.module):
            for example in part.examples:
                part.module(**example)
    finally:
        for handle in handles:
            handle.remove()
    return experts.each(name for name, peak in peaks.items() if not peak <= FP16_SAFE)


def choose_dialect(
    traced: TracedDecoder, linears: LinearEmitter, target: Target, blocks: BlockMasks | None = None
) -> Dialect:
    """The dialect of `target` that says what was traced: `OrtDialect` where the rotary embedding was taken out.

    `blocks` are the decoder part's.

    Raises `BadInputError` for a static cache without a length, or with one that the model's positions do not reach.
    """
    if target.onnx.dialect == "tensorrt":
        length = linears.plan.options.cache_length
        if length is None:
            raise BadInputError("TensorRT's decoder has a static cache; its length is missing (--max-seq)")
        rotary = traced.rotary
        if isinstance(rotary, RotaryOperator | RotaryInTrace):
            raise ValueError("positions on several axes have no form in TensorRT's dialect")
        return TensorRTDialect(linears, target.onnx.opset, length, rotary, blocks)
    if traced.rotary is not None:
        opset = target.onnx.opset
        if isinstance(traced.rotary, RotaryOperator) or traced.cross is not None:
            opset = max(_STANDARD_OPSET, opset)
        return OrtDialect(traced.rotary, linears, opset, linears.weights.cache_peaks, blocks)
    return StandardDialect(max(_STANDARD_OPSET, target.onnx.opset), blocks)


def _cache_scales(dialect: Dialect) -> tuple[torch.Tensor, ...]:
    found = dialect.cache_scales if isinstance(dialect, OrtDialect) else {}
    return tuple(scale for layer in sorted(found) for scale in found[layer])


def lm_head(vlm: VLM, module: DecoderPart) -> LinearRef:
    """The LM head; raises `UnsupportedModelError` when it is not a linear layer."""
    head = module.head
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the LM head is a {type(head).__name__}, not a linear layer"
        )
    path = module_path(vlm.model, head)
    bias = "" if head.bias is None else f"{path}.bias"
    return LinearRef(f"{path}.weight", bias, head.in_features, head.out_features)
