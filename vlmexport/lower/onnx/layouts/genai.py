"""The ``genai`` layout: what onnxruntime-genai loads and runs.

Three graphs at the root of the folder, ``genai_config.json``, and the settings of its image processor under a name of
their own, so that the model's own processor files stay as they are (docs/manifest.md).
"""

from __future__ import annotations

from pathlib import Path

from vlmexport.families.transformersjs import WebFamily
from vlmexport.lower.onnx.decoder import FLOAT_TYPES, lower_decoder
from vlmexport.lower.onnx.embedding import lower_embedding
from vlmexport.lower.onnx.genai_families import genai_family
from vlmexport.lower.onnx.genai_files import genai_root_files
from vlmexport.lower.onnx.genai_graphs import keep_every_logit, with_merge
from vlmexport.lower.onnx.layouts.split import kept_tensors, part_file, write_folded
from vlmexport.lower.onnx.web_vision import trace_web_vision
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.lower.result import Emitted
from vlmexport.manifest import PartFile
from vlmexport.model.load import VLM
from vlmexport.plan import ExportPlan
from vlmexport.progress import Progress
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.parts import Role, Split
from vlmexport.target import Target

_FILES = {Role.VISION_ENCODER: "vision.onnx", Role.EMBEDDING: "embedding.onnx", Role.DECODER: "decoder.onnx"}
# Its vision graphs take the processor's own names.
_OWN_NAMES = WebFamily("", "")


def emit_genai(
    vlm: VLM,
    split: Split,
    plan: ExportPlan,
    target: Target,
    weights: DecoderWeights,
    folder: Path,
    progress: Progress,
) -> Emitted:
    """Write the graphs of `split` into `folder`; raises `UnsupportedModelError` for what the runtime cannot run."""
    family = genai_family(vlm, split)
    parts: dict[str, PartFile] = {}
    kind, opset = FLOAT_TYPES[plan.decoder_dtype], target.onnx.opset
    files = genai_root_files(vlm, family, split, _FILES)
    vision = trace_web_vision(vlm.model, split, opset).graph(_OWN_NAMES, plan.encoder_dtype, kind)
    table = with_merge(lower_embedding(split.parts[Role.EMBEDDING], opset, kind), split.merge.image_token_id)
    decoder = lower_decoder(vlm, split.parts[Role.DECODER], plan, target, weights)
    made = keep_every_logit(decoder.model.graph)
    for role, model, groups in (
        (Role.VISION_ENCODER, vision.model, vision.groups),
        (Role.EMBEDDING, table.model, table.groups),
        (Role.DECODER, decoder.model, tuple(decoder.linears.groups)),
    ):
        stream_weights(model, groups, folder / _FILES[role], progress, f"write {_FILES[role]}")
        parts[role] = part_file(model, _FILES[role])
    write_folded(weights, folder)
    quantized = tuple(decoder.linears.records)
    return Emitted(
        parts,
        quantized,
        kept_tensors(plan, quantized, list(vision.kept)),
        facts={"made_inputs": list(made), "genai_type": family.runs_as},
        root_files=files,
    )
