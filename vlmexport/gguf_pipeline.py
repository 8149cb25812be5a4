"""The pipeline of ``vlmexport gguf``: load, plan, calibrate where asked, write both files, package, verify.

As with the other exports, the folder is built beside its destination and renamed when it is finished.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.card_proof import write_proof
from vlmexport.gguf_options import File, GgufOptions, GgufPlan
from vlmexport.gguf_plan import plan_gguf
from vlmexport.manifest import Artifact, write_manifest
from vlmexport.progress import Progress
from vlmexport.workspace import build_beside, calibration_folder, check_destination, move_into_place

if TYPE_CHECKING:
    from vlmexport.calibrate.gguf import GgufWeights
    from vlmexport.lower.gguf.vocab import Vocabulary
    from vlmexport.manifest import QuantizedRecord
    from vlmexport.model.load import VLM
    from vlmexport.verify.result import ParityReport


@dataclass(frozen=True)
class GgufResult:
    """A finished export and, when the gate ran, what it said.

    ``artifact.path`` is the folder asked for, or ``<folder>.failed`` when the gate turned red.
    """

    artifact: Artifact
    plan: GgufPlan
    report: ParityReport | None


def export_gguf(
    model: str,
    out: Path,
    options: GgufOptions,
    *,
    calibration: CalibrationOptions | None = None,
    force: bool,
    verify: bool,
    progress: Progress,
    lora: str | None = None,
    trust_remote_code: bool = False,
    threads: int = 0,
) -> GgufResult:
    """Export `model` into the folder `out` as a text GGUF and an ``mmproj`` GGUF.

    Raises `BadInputError` for input that cannot be exported (nothing is written), `NotPossibleHereError` when the disk
    is full or a package is missing. A red gate is not raised: it is in the result, and the export is ``<out>.failed``.
    """
    check_destination(out, force)
    failed = out.with_name(out.name + ".failed")
    check_destination(failed, True)
    vlm = _load(model, lora, trust_remote_code, progress)
    plan = plan_gguf(vlm, options)
    vocabulary = gguf_vocabulary(vlm, plan)
    check_quantizers(plan)  # before anything is calibrated
    with build_beside(out) as workspace, calibration_folder(out) as work:
        weights = _decoder_weights(vlm, plan, calibration or CalibrationOptions(), work, progress)
        artifact = _write(vlm, plan, vocabulary, weights, workspace, progress, threads)
        del weights, vlm  # the gate loads its own reference
        report = None
        if verify:
            report = _verify(artifact, model, lora, trust_remote_code, progress)
            results = {**artifact.manifest.results, "verify": report.to_dict()}
            write_proof(workspace, report.to_dict())
            artifact = write_manifest(workspace, dataclasses.replace(artifact.manifest, results=results))
        destination = failed if report is not None and report.status == "failed" else out
        move_into_place(workspace, destination)
    return GgufResult(Artifact(destination, artifact.manifest), plan, report)


def _load(model: str, lora: str | None, trust_remote_code: bool, progress: Progress) -> VLM:
    from vlmexport.model.load import load_vlm

    with progress.stage("load model"):
        return load_vlm(model, lora=lora, trust_remote_code=trust_remote_code)


def gguf_vocabulary(vlm: VLM, plan: GgufPlan) -> Vocabulary:
    """The vocabulary that the text file gets, with the notes of both halves.

    Raises `BadInputError` or `NotPossibleHereError` as `read_vocabulary`, and `UnsupportedModelError` when a token is
    missing without which llama.cpp stops at a picture.
    """
    from vlmexport.lower.gguf.mismatches import require_tokens
    from vlmexport.lower.gguf.vocab import read_vocabulary

    vocabulary = read_vocabulary(vlm.path, plan.arch, vlm.model.get_input_embeddings().weight.shape[0])
    notes = require_tokens(plan.projector, vocabulary.metadata)
    return dataclasses.replace(vocabulary, notes=(*vocabulary.notes, *notes))


def check_quantizers(plan: GgufPlan) -> None:
    """Raise `NotPossibleHereError` when the plan needs ggml's own quantizers and they are not installed."""
    from vlmexport.quantize.ggml.blocks import NUMPY_TYPES
    from vlmexport.quantize.ggml.library import require_library
    from vlmexport.quantize.ggml.types import ggml_type

    rounded = {t.type for t in plan.tensors if t.scheme is None and ggml_type(t.type).block > 1}
    if rounded - NUMPY_TYPES or (rounded - {"Q8_0"} and plan.options.imatrix != "none"):
        require_library()


def _decoder_weights(
    vlm: VLM, plan: GgufPlan, calibration: CalibrationOptions, work: Path, progress: Progress
) -> GgufWeights:
    """The decoder's weights and the importance of their columns; the model is split only where that is needed."""
    from vlmexport.calibrate.gguf import gguf_decoder_weights

    return gguf_decoder_weights(vlm, plan, calibration, work, progress)


def _write(
    vlm: VLM,
    plan: GgufPlan,
    vocabulary: Vocabulary,
    weights: GgufWeights,
    folder: Path,
    progress: Progress,
    threads: int,
) -> Artifact:
    """Both files, the model's own files, the card and the manifest."""
    from vlmexport.lower.gguf.emit import GgufInputs, emit_gguf

    names = file_names(vlm, plan.options)
    inputs = GgufInputs(
        weights=dict(vlm.model.state_dict(keep_vars=True)),
        decoder=weights.weights,
        vocabulary=vocabulary,
        importance=weights.importance,
        imatrix_facts=weights.facts,
        general={"general.name": model_name(vlm)},
    )
    records = emit_gguf(plan, inputs, {f: folder / n for f, n in names.items()}, progress, threads=threads)
    with progress.stage("package"):
        return _package(vlm, plan, vocabulary, weights, records, names, folder)


def model_name(vlm: VLM) -> str:
    """The model's name in files and metadata: the last part of the hub id (without its revision) or of the folder."""
    if vlm.source == "demo":
        return "vlmexport-demo"
    if Path(vlm.source).is_dir():
        return Path(vlm.source).resolve().name
    return vlm.source.partition("@")[0].rpartition("/")[2]


def file_names(vlm: VLM, options: GgufOptions) -> dict[File, str]:
    """The two files as llama.cpp's users know them: ``NAME-Q4_K_M.gguf`` and ``mmproj-NAME-f16.gguf``."""
    name = model_name(vlm)
    return {"text": f"{name}-{options.quant}.gguf", "mmproj": f"mmproj-{name}-{options.mmproj_type.lower()}.gguf"}


def _package(
    vlm: VLM,
    plan: GgufPlan,
    vocabulary: Vocabulary,
    weights: GgufWeights,
    records: tuple[QuantizedRecord, ...],
    names: dict[File, str],
    folder: Path,
) -> Artifact:
    from vlmexport.gguf_card import gguf_card
    from vlmexport.manifest import KeptTensor, Manifest, PartFile
    from vlmexport.package import copy_model_files, source_facts, tool_versions

    copy_model_files(vlm.path, folder)
    _write_calibration(weights, plan, folder)
    parts = {"decoder": PartFile(names["text"], (), ()), "vision_encoder": PartFile(names["mmproj"], (), ())}
    kept = tuple(
        KeptTensor(t.source, "decoder" if t.file == "text" else "vision_encoder", t.type, t.reason)
        for t in plan.tensors
        if t.scheme is None and t.source and t.output == 0
    )
    manifest = Manifest(
        layout="gguf",
        target="llamacpp",
        created_by=tool_versions(),
        source=source_facts(vlm),
        model=_model(vlm, plan, [*vocabulary.notes, *plan.notes, *weights.notes], vocabulary),
        plan=plan.to_dict(),
        parts=parts,
        quantized=records,
        unquantized=kept,
        results={"verify": None, "bench": None},
        calibration=weights.report,
    )
    card = gguf_card(manifest, plan, model_name(vlm), vlm.path, weights.imatrix_origin)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return write_manifest(folder, manifest)


def _write_calibration(weights: GgufWeights, plan: GgufPlan, folder: Path) -> None:
    """What the calibration made and llama.cpp's own tools or the gate can read: importances, and moved scales.

    Of the scales the factors alone, since with ``--smooth awq`` most of the model's weights are changed by them.
    """
    from safetensors.torch import save

    from vlmexport.manifest import FOLDS_NAME, IMATRIX_NAME
    from vlmexport.quantize.fold import folds_to_tensors
    from vlmexport.quantize.ggml.imatrix import write_imatrix

    if weights.imatrix is not None and not weights.source:
        write_imatrix(folder / IMATRIX_NAME, weights.imatrix)
    folds = {name: fold for name, fold in weights.weights.folds.items() if name not in plan.schemes}
    if folds:
        (folder / FOLDS_NAME).write_bytes(save(folds_to_tensors(folds)))


def _model(vlm: VLM, plan: GgufPlan, notes: list[str], vocabulary: Vocabulary) -> dict[str, Any]:
    kv = vlm.facts.kv
    return {
        "architecture": vlm.facts.architecture,
        "model_type": vlm.facts.model_type,
        "hidden_size": vlm.facts.hidden_size,
        "vocab_size": vlm.facts.vocab_size,
        "image_token_id": vlm.facts.image_token_id,
        "kv": {"layers": kv.layers, "heads": kv.heads, "head_dim": kv.head_dim, "dtype": "float16"},
        "eos_token_ids": list(vlm.facts.eos_token_ids),
        "gguf": {
            "arch": plan.arch,
            "projector": plan.projector,
            "quant": plan.options.quant,
            "mmproj_type": plan.options.mmproj_type,
            "probe_text": vocabulary.probe_text,
            "probe_ids": list(vocabulary.probe_ids),
            "notes": notes,
        },
    }


def _verify(
    artifact: Artifact, model: str, lora: str | None, trust_remote_code: bool, progress: Progress
) -> ParityReport:
    from vlmexport.verify.run import verify_artifact

    return verify_artifact(
        artifact.path, model=model, lora=lora, samples=None, progress=progress, trust_remote_code=trust_remote_code
    )
