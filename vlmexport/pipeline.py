"""The pipeline: load, split, plan, lower, package, verify. Each stage takes typed inputs; this file is the list.

An export is built in a folder beside its destination and renamed when it is finished (`vlmexport.workspace`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.calibrate.auto import settle_bits
from vlmexport.calibrate.kv_cache import with_cache_peaks
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.card_proof import write_proof
from vlmexport.dtypes import WEB_LAYOUT, check_folder_name, settle_dtypes
from vlmexport.genai_options import GENAI_LAYOUT
from vlmexport.manifest import Artifact, write_manifest
from vlmexport.plan import ExportPlan, OnnxOptions, check_options, plan_export
from vlmexport.plan_file import PLAN_NAME, QuantPlan
from vlmexport.progress import Progress
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.retrieval_plan import check_retrieval
from vlmexport.target import Target, load_target
from vlmexport.workspace import build_beside, calibration_folder, check_destination, move_into_place

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split
    from vlmexport.verify.result import ParityReport


@dataclass(frozen=True)
class ExportResult:
    """A finished export and, when the gate ran, what it said.

    ``artifact.path`` is the folder asked for, or ``<folder>.failed`` when the gate turned red. `quant_plan` is the
    choice of bits that was made or given; the export holds it as ``quantization_plan.json``.
    """

    artifact: Artifact
    report: ParityReport | None
    quant_plan: QuantPlan | None = None


def export_onnx(
    model: str,
    out: Path,
    options: OnnxOptions,
    *,
    calibration: CalibrationOptions | None = None,
    force: bool,
    verify: bool,
    progress: Progress,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Export `model` into the folder `out`.

    Raises `BadInputError` for input that cannot be exported (nothing is written), `NotPossibleHereError` when the disk
    is full or read-only. A red gate is not raised: it is in the result, and the export is in ``<out>.failed``.
    """
    check_destination(out, force)
    failed = out.with_name(out.name + ".failed")
    check_destination(failed, True)  # an earlier failed export may be replaced, a folder of the user's may not
    target = load_target(options.target)
    options = settle_dtypes(options)
    check_folder_name(out, options)
    check_options(options, target)
    preprocessor = preprocessing_graph(model, options, target, trust_remote_code)
    vlm, split = load_and_split(model, trust_remote_code, progress, lora=lora, options=options)
    check_feeds(preprocessor, split)
    check_layout(vlm, split, options)
    chosen = calibration or CalibrationOptions()
    if options.choice is None:
        plan_export(vlm, split, target, options)  # refuses before finished layers are at stake
    with build_beside(out) as workspace, calibration_folder(out) as work:
        options, quant_plan = settle_bits(vlm, split, target, options, chosen, work, progress)
        plan = plan_export(vlm, split, target, options)
        if quant_plan is not None:
            quant_plan.write(workspace / PLAN_NAME)
        weights, calibrated = decoder_weights(vlm, split, plan.schemes, chosen, work, progress)
        if options.kv_cache == "int8":
            weights, calibrated = with_cache_peaks(weights, calibrated, vlm, chosen, progress)
        artifact = _lower_and_package(vlm, split, plan, target, weights, calibrated, preprocessor, workspace, progress)
        del weights
        del vlm, split  # the gate loads its own reference: two models in memory would be one too many
        report = None
        if verify:
            report = _verify(artifact, model, lora, trust_remote_code, progress)
            results = {**artifact.manifest.results, "verify": report.to_dict()}
            write_proof(workspace, report.to_dict())
            artifact = write_manifest(workspace, dataclasses.replace(artifact.manifest, results=results))
        red = report is not None and report.status == "failed"
        destination = failed if red else out
        move_into_place(workspace, destination)
    return ExportResult(Artifact(destination, artifact.manifest), report, quant_plan)


def load_and_split(
    model: str,
    trust_remote_code: bool,
    progress: Progress,
    *,
    lora: str | None = None,
    options: OnnxOptions | None = None,
) -> tuple[VLM, Split]:
    """The first two stages; `lora` is an adapter that is merged into `model`.

    A model that gives embeddings is refused without `options`, and where those are not for such a model.
    """
    from vlmexport.model.load import load_vlm
    from vlmexport.split.capture import split_model

    with progress.stage("load model"):
        vlm = load_vlm(model, lora=lora, trust_remote_code=trust_remote_code, embeddings=options is not None)
    if options is not None:
        check_retrieval(vlm, options)
    with progress.stage("split and replay"):
        return vlm, split_model(vlm)


def check_layout(vlm: VLM, split: Split, options: OnnxOptions) -> None:
    """Raise `UnsupportedModelError` for a model that the layout's client cannot run, before any work."""
    if options.layout == WEB_LAYOUT:
        from vlmexport.lower.onnx.web_families import web_family

        web_family(vlm, split)
    if options.layout == GENAI_LAYOUT:
        from vlmexport.lower.onnx.genai_families import genai_family

        genai_family(vlm, split)


def preprocessing_graph(model: str, options: OnnxOptions, target: Target, trust_remote_code: bool) -> ir.Model | None:
    """The graph of ``--with-preprocessor``, compared with the processor before any work; None without the option."""
    if not options.preprocessor:
        return None
    from vlmexport.lower.onnx.preprocess_proof import proven_preprocessor

    return proven_preprocessor(model, options.layout, target.onnx.opset, trust_remote_code=trust_remote_code)


def check_feeds(preprocessor: ir.Model | None, split: Split) -> None:
    """Raise `UnsupportedModelError` when a preprocessing graph does not make what the vision encoder takes."""
    if preprocessor is not None:
        from vlmexport.lower.onnx.preprocess_proof import check_outputs

        check_outputs(preprocessor, split)


def _lower_and_package(
    vlm: VLM,
    split: Split,
    plan: ExportPlan,
    target: Target,
    weights: DecoderWeights,
    calibration: dict[str, Any] | None,
    preprocessor: ir.Model | None,
    folder: Path,
    progress: Progress,
) -> Artifact:
    from vlmexport.lower import emitter
    from vlmexport.lower.onnx.preprocess_proof import with_preprocessor
    from vlmexport.package import package

    emitted = emitter("onnx", plan.options.layout)(vlm, split, plan, target, weights, folder, progress)
    if preprocessor is not None:
        emitted = with_preprocessor(emitted, preprocessor, folder)
    with progress.stage("package"):
        return package(vlm, split, plan, target, emitted, folder, calibration)


def _verify(
    artifact: Artifact, model: str, lora: str | None, trust_remote_code: bool, progress: Progress
) -> ParityReport:
    from vlmexport.verify.run import verify_artifact

    return verify_artifact(
        artifact.path, model=model, lora=lora, samples=None, progress=progress, trust_remote_code=trust_remote_code
    )
