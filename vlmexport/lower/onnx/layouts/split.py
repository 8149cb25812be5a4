"""The ``split`` and ``tensorrt`` layouts: one graph per part at the root of the folder, with its external data.

See docs/manifest.md. Which of the two a folder is depends on the target's dialect alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.decoder import FLOAT_TYPES, lower_decoder
from vlmexport.lower.onnx.embedding import lower_embedding
from vlmexport.lower.onnx.encoder import lower_vision
from vlmexport.lower.onnx.precision import EncoderPrecision
from vlmexport.lower.onnx.prefill import PrefillGraph, lower_prefill
from vlmexport.lower.onnx.states_encoder import lower_states
from vlmexport.lower.onnx.table_projector import shares_table, write_table_projector
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.lower.result import Emitted
from vlmexport.manifest import FOLDED_NAME, PREFILL_PART, KeptTensor, PartFile, QuantizedRecord, TensorSpec
from vlmexport.model.load import VLM
from vlmexport.plan import ExportPlan
from vlmexport.progress import Progress
from vlmexport.quantize.kv_cache import scales_digest
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.parts import Role, Split
from vlmexport.target import Target

_MATRIX_AXES = 2


def emit_split(
    vlm: VLM,
    split: Split,
    plan: ExportPlan,
    target: Target,
    weights: DecoderWeights,
    folder: Path,
    progress: Progress,
) -> Emitted:
    """Write the graphs of `split` into `folder`, one after the other."""
    parts: dict[str, PartFile] = {}
    kept: list[KeptTensor] = []
    precision = EncoderPrecision(plan.encoder_dtype, target.onnx.encoder_arithmetic)
    for role in (Role.VISION_ENCODER, Role.PROJECTOR):
        if role is Role.PROJECTOR and shares_table(split):
            continue
        graph = lower_vision(vlm.model, split.parts[role], precision, target.onnx.opset, dialect=target.onnx.dialect)
        kept += graph.kept
        stream_weights(graph.model, graph.groups, folder / f"{role}.onnx", progress, f"write {role}")
        parts[role] = part_file(graph.model, f"{role}.onnx")
    table = lower_embedding(split.parts[Role.EMBEDDING], target.onnx.opset, FLOAT_TYPES[plan.decoder_dtype])
    stream_weights(table.model, table.groups, folder / f"{Role.EMBEDDING}.onnx", progress, f"write {Role.EMBEDDING}")
    parts[Role.EMBEDDING] = part_file(table.model, f"{Role.EMBEDDING}.onnx")
    if Role.ENCODER in split.parts:
        states = lower_states(vlm.model, split.parts[Role.ENCODER], plan, target)
        kept += states.kept
        stream_weights(states.model, states.groups, folder / f"{Role.ENCODER}.onnx", progress, f"write {Role.ENCODER}")
        parts[Role.ENCODER] = part_file(states.model, f"{Role.ENCODER}.onnx")
    if shares_table(split):
        parts[Role.PROJECTOR] = part_file(
            *write_table_projector(split, target.onnx.opset, folder, progress, table.model)
        )
    decoder = lower_decoder(vlm, split.parts[Role.DECODER], plan, target, weights)
    title = "quantize and write decoder" if weights.schemes else "write decoder"
    stream_weights(decoder.model, decoder.linears.groups, folder / f"{Role.DECODER}.onnx", progress, title)
    parts[Role.DECODER] = part_file(decoder.model, f"{Role.DECODER}.onnx")
    write_folded(weights, folder)
    quantized = tuple(decoder.linears.records)
    digest = scales_digest(decoder.cache_scales) if decoder.cache_scales else None
    emitted = Emitted(parts, quantized, kept_tensors(plan, quantized, kept), digest)
    if plan.options.prefill == "same":
        return emitted
    prompt = lower_prefill(vlm, split.parts[Role.DECODER], plan, target, weights, decoder.traced)
    return _with_prefill(emitted, prompt, decoder.model.graph.initializers, folder, progress)


def _with_prefill(
    emitted: Emitted, prompt: PrefillGraph, written: Mapping[str, ir.Value], folder: Path, progress: Progress
) -> Emitted:
    """Write the prompt graph, which refers to the decode graph's data for all that is in `written`."""
    file = f"{PREFILL_PART}.onnx"
    stream_weights(prompt.model, prompt.linears.groups, folder / file, progress, "write prompt graph", written)
    return dataclasses.replace(
        emitted,
        parts={**emitted.parts, PREFILL_PART: part_file(prompt.model, file)},
        quantized=(*emitted.quantized, *prompt.linears.records),
        prefill=prompt.summary(),
    )


def write_folded(weights: DecoderWeights, folder: Path) -> None:
    """Keep the floats that calibration changed beside the graphs: the gate's reference needs them."""
    from safetensors.torch import save

    if folded := weights.folded():
        # Not `save_file`, which makes a file that only its owner may read.
        (folder / FOLDED_NAME).write_bytes(save({name: tensor.contiguous() for name, tensor in folded.items()}))


def part_file(model: ir.Model, file: str) -> PartFile:
    """The typed inputs and outputs of a graph, as the manifest lists them."""
    return PartFile(file, tuple(_spec(v) for v in model.graph.inputs), tuple(_spec(v) for v in model.graph.outputs))


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None or value.name is None:
        raise ValueError(f"graph input or output {value.name} has no type")
    dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, dims)


def _quantized_names(quantized: tuple[QuantizedRecord, ...], plan: ExportPlan) -> set[str]:
    """The planned weights that the graphs hold as codes; packed experts where all of them are there."""
    inside = {member.name for record in quantized for member in record.members}
    packed = (w for w in plan.weights if w.action == "quantize" and len(w.shape) > _MATRIX_AXES)
    return inside | {w.name for w in packed if all(f"{w.name}.{e}" in inside for e in range(w.shape[0]))}


def kept_tensors(
    plan: ExportPlan, quantized: tuple[QuantizedRecord, ...], emitted: list[KeptTensor]
) -> tuple[KeptTensor, ...]:
    """Every planned weight that is in no quantized tensor, as it was really stored.

    Refuses a weight that was planned to be quantized and is in no graph.
    """
    inside = _quantized_names(quantized, plan)
    lost = [w.name for w in plan.weights if w.action == "quantize" and w.name not in inside]
    if lost:
        raise UnsupportedModelError(f"{len(lost)} weights were to be quantized but no graph uses them: {lost[0]}")
    stored = {k.name: k for k in emitted}
    planned = (w for w in plan.weights if w.name not in inside)
    return tuple(stored.get(w.name) or KeptTensor(w.name, w.part, w.dtype, w.reason) for w in planned)
