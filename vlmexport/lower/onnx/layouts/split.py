"""The ``split`` layout: one graph per part at the root of the folder, with its external data (docs/manifest.md)."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.decoder import FLOAT_TYPES, lower_decoder
from vlmexport.lower.onnx.embedding import lower_embedding
from vlmexport.lower.onnx.encoder import lower_vision
from vlmexport.lower.onnx.precision import EncoderPrecision
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.lower.result import Emitted
from vlmexport.manifest import KeptTensor, PartFile, QuantizedRecord, TensorSpec
from vlmexport.model.load import VLM
from vlmexport.plan import ExportPlan
from vlmexport.progress import Progress
from vlmexport.split.parts import Role, Split
from vlmexport.target import Target


def emit_split(vlm: VLM, split: Split, plan: ExportPlan, target: Target, folder: Path, progress: Progress) -> Emitted:
    """Write the four graphs of `split` into `folder`, one after the other."""
    parts: dict[str, PartFile] = {}
    kept: list[KeptTensor] = []
    precision = EncoderPrecision(plan.encoder_dtype, target.onnx.encoder_arithmetic)
    for role in (Role.VISION_ENCODER, Role.PROJECTOR):
        graph = lower_vision(vlm.model, split.parts[role], precision, target.onnx.opset)
        kept += graph.kept
        stream_weights(graph.model, graph.groups, folder / f"{role}.onnx", progress, f"write {role}")
        parts[role] = part_file(graph.model, f"{role}.onnx")
    table = lower_embedding(split.parts[Role.EMBEDDING], target.onnx.opset, FLOAT_TYPES[plan.decoder_dtype])
    stream_weights(table.model, table.groups, folder / f"{Role.EMBEDDING}.onnx", progress, f"write {Role.EMBEDDING}")
    parts[Role.EMBEDDING] = part_file(table.model, f"{Role.EMBEDDING}.onnx")
    decoder = lower_decoder(vlm, split.parts[Role.DECODER], plan, target)
    title = "quantize and write decoder" if plan.options.scheme is not None else "write decoder"
    stream_weights(decoder.model, decoder.linears.groups, folder / f"{Role.DECODER}.onnx", progress, title)
    parts[Role.DECODER] = part_file(decoder.model, f"{Role.DECODER}.onnx")
    quantized = tuple(decoder.linears.records)
    return Emitted(parts, quantized, _kept(plan, quantized, kept))


def part_file(model: ir.Model, file: str) -> PartFile:
    """The typed inputs and outputs of a graph, as the manifest lists them."""
    return PartFile(file, tuple(_spec(v) for v in model.graph.inputs), tuple(_spec(v) for v in model.graph.outputs))


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None or value.name is None:
        raise ValueError(f"graph input or output {value.name} has no type")
    dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, dims)


def _kept(
    plan: ExportPlan, quantized: tuple[QuantizedRecord, ...], emitted: list[KeptTensor]
) -> tuple[KeptTensor, ...]:
    """Every planned weight that is in no quantized tensor, as it was really stored.

    Refuses a weight that was planned to be quantized and is in no graph.
    """
    inside = {member.name for record in quantized for member in record.members}
    lost = [w.name for w in plan.weights if w.action == "quantize" and w.name not in inside]
    if lost:
        raise UnsupportedModelError(f"{len(lost)} weights were to be quantized but no graph uses them: {lost[0]}")
    stored = {k.name: k for k in emitted}
    planned = (w for w in plan.weights if w.name not in inside)
    return tuple(stored.get(w.name) or KeptTensor(w.name, w.part, w.dtype, w.reason) for w in planned)
