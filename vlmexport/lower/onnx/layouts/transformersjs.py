"""The ``transformersjs`` layout: what ``@huggingface/transformers`` loads, in one or several precisions.

Three graphs for each dtype in ``onnx/``, named by the client's suffixes (docs/manifest.md). The vision side and the
decoder are traced once; dtypes with codes of one width share them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlmexport.dtypes import WEB_DTYPES, WebDtype, check_widths, options_of, plain_scheme
from vlmexport.families.transformersjs import WebFamily
from vlmexport.lower.onnx.decoder import FLOAT_TYPES, lower_decoder
from vlmexport.lower.onnx.embedding import lower_embedding
from vlmexport.lower.onnx.layouts.split import kept_tensors, part_file, write_folded
from vlmexport.lower.onnx.trace import TracedDecoder
from vlmexport.lower.onnx.web_decoder import as_client_decodes
from vlmexport.lower.onnx.web_families import web_family
from vlmexport.lower.onnx.web_files import web_root_files
from vlmexport.lower.onnx.web_vision import TracedVision, trace_web_vision
from vlmexport.lower.onnx.weights import WeightGroup, stream_weights
from vlmexport.lower.result import Emitted
from vlmexport.manifest import KeptTensor, PartFile, QuantizedRecord
from vlmexport.model.load import VLM
from vlmexport.model.merge import MergeSpec
from vlmexport.plan import ExportPlan, plan_export
from vlmexport.progress import Progress
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.parts import Role, Split
from vlmexport.target import Target
from vlmexport.variants import Variant

FOLDER = "onnx"
# Graph and weights are one file up to here: what a browser holds in one buffer, and what protobuf can read.
ONE_FILE_BYTES = 2_000_000_000
_FILES = {
    Role.VISION_ENCODER: "vision_encoder",
    Role.EMBEDDING: "embed_tokens",
    Role.DECODER: "decoder_model_merged",
}


def emit_transformersjs(
    vlm: VLM,
    split: Split,
    plan: ExportPlan,
    target: Target,
    weights: DecoderWeights,
    folder: Path,
    progress: Progress,
) -> Emitted:
    """Write the graphs of every dtype of `plan` into ``folder/onnx``; `weights` are the primary dtype's.

    Raises `UnsupportedModelError` for a model that transformers.js cannot run, `BadInputError` for a dtype that the
    weights have no codes of.
    """
    writer = _Writer(vlm, split, plan, target, weights, folder, progress, web_family(vlm, split))
    plans = {name: writer.plan_of(WEB_DTYPES[name]) for name in plan.options.dtypes}
    for name, own in plans.items():
        check_widths(own, WEB_DTYPES[name])
    (folder / FOLDER).mkdir()
    variants = {name: writer.write(WEB_DTYPES[name], own) for name, own in plans.items()}
    write_folded(weights, folder)
    primary = variants[plan.options.dtypes[0]]
    return Emitted(
        primary.parts,
        primary.quantized,
        primary.unquantized,
        facts={
            "variant": plan.options.dtypes[0],
            "variants": {name: variant.to_dict() for name, variant in variants.items()},
            **_own_merge(split.merge),
            **({"made_inputs": list(writer.made_inputs)} if writer.made_inputs else {}),
            **({"vision_names": dict(writer.family.inputs)} if writer.family.inputs else {}),
        },
        root_files=web_root_files(vlm, writer.family, plan.options.dtypes, writer.external),
    )


def _own_merge(merge: MergeSpec) -> dict[str, Any]:
    """The manifest's ``merge`` where the vision graph takes the rows of patches that a processor makes of all pictures.

    Pictures that stand in a frame are still cut out of it by our runner; the client has no frames.
    """
    if merge.pictures is None or not merge.pictures.patches:
        return {}
    return {"merge": dataclasses.replace(merge, pictures=None).to_dict()}


@dataclass
class _Writer:
    """Writes dtype after dtype; what they share is made once. `external` counts data files by graph file.

    `made_inputs` are those that the decoder makes by itself.
    """

    vlm: VLM
    split: Split
    primary: ExportPlan
    target: Target
    weights: DecoderWeights
    folder: Path
    progress: Progress
    family: WebFamily
    vision: TracedVision | None = None
    decoder: TracedDecoder | None = None
    external: dict[str, int] = field(default_factory=dict)
    made_inputs: tuple[str, ...] = ()

    def plan_of(self, dtype: WebDtype) -> ExportPlan:
        """The plan of one dtype: the primary plan's codes where they are of its width, else codes of its own."""
        options = self.primary.options
        if dtype.name == options.dtypes[0]:
            return self.primary
        scheme = None
        if dtype.bits is not None:
            scheme = options.scheme if self._shares_codes(dtype) else plain_scheme(dtype.bits)
        return plan_export(self.vlm, self.split, self.target, options_of(options, dtype, scheme))

    def _shares_codes(self, dtype: WebDtype) -> bool:
        """Are the dtype's weights the primary one's?"""
        return dtype.bits == WEB_DTYPES[self.primary.options.dtypes[0]].bits

    def write(self, dtype: WebDtype, plan: ExportPlan) -> Variant:
        """Write the three graphs of one dtype."""
        parts: dict[str, PartFile] = {}
        kept = self._write_vision(dtype, parts)
        self._write_embedding(dtype, parts)
        records = self._write_decoder(dtype, plan, parts)
        folded = self._shares_codes(dtype) and bool(self.weights.folds)
        unquantized = kept_tensors(plan, records, kept)
        half = "float16" if dtype.decoder == "fp16" else "float32"
        return Variant(half, plan.kv_bytes_per_token, parts, records, unquantized, folded)

    def _write_vision(self, dtype: WebDtype, parts: dict[str, PartFile]) -> list[KeptTensor]:
        if self.vision is None:
            self.vision = trace_web_vision(self.vlm.model, self.split, self.target.onnx.opset)
        graph = self.vision.graph(self.family, dtype.encoder, FLOAT_TYPES[dtype.decoder])
        self._save(Role.VISION_ENCODER, dtype, graph.model, graph.groups, parts)
        return list(graph.kept)

    def _write_embedding(self, dtype: WebDtype, parts: dict[str, PartFile]) -> None:
        part = self.split.parts[Role.EMBEDDING]
        table = lower_embedding(part, self.target.onnx.opset, FLOAT_TYPES[dtype.decoder])
        self._save(Role.EMBEDDING, dtype, table.model, table.groups, parts)

    def _write_decoder(
        self, dtype: WebDtype, plan: ExportPlan, parts: dict[str, PartFile]
    ) -> tuple[QuantizedRecord, ...]:
        weights = self.weights if self._shares_codes(dtype) else DecoderWeights(self.weights.tensors, plan.schemes)
        part = self.split.parts[Role.DECODER]
        made = lower_decoder(self.vlm, part, plan, self.target, weights, traced=self.decoder)
        self.decoder = made.traced
        self.made_inputs = as_client_decodes(made.model.graph)
        self._save(Role.DECODER, dtype, made.model, tuple(made.linears.groups), parts)
        return tuple(made.linears.records)

    def _save(
        self,
        role: Role,
        dtype: WebDtype,
        model: ir.Model,
        groups: tuple[WeightGroup, ...],
        parts: dict[str, PartFile],
    ) -> None:
        name = f"{_FILES[role]}{dtype.suffix}.onnx"
        path = self.folder / FOLDER / name
        stream_weights(model, groups, path, self.progress, f"write {name}")
        if not put_into_one_file(path):
            self.external[name] = 1
        parts[role] = part_file(model, f"{FOLDER}/{name}")


def put_into_one_file(path: Path) -> bool:
    """Take the external data of the graph at `path` into it; False where both together are too large for that."""
    data = path.with_name(path.name + "_data")
    if not data.exists():
        return True
    if data.stat().st_size + path.stat().st_size > ONE_FILE_BYTES:
        return False
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    ir.save(model, path)
    data.unlink()
    return True
