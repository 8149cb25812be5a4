"""The pipeline of ``vlmexport trt``: graphs, lint, engines, scripts, Triton repository, gate."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.card_proof import write_proof
from vlmexport.engines import ENGINES_FOLDER, EngineSpec, ShapeProfile, engine_specs
from vlmexport.errors import UnsupportedModelError, VlmExportError
from vlmexport.manifest import Artifact, write_manifest
from vlmexport.pipeline import load_and_split
from vlmexport.progress import Progress
from vlmexport.target import load_target
from vlmexport.trt_options import TARGET, TrtOptions
from vlmexport.trt_plan import EngineDecision, TrtPlan, check_trt_options, plan_trt
from vlmexport.workspace import build_beside, calibration_folder, check_destination, move_into_place

if TYPE_CHECKING:
    from vlmexport.lower.result import Emitted
    from vlmexport.lower.tensorrt.build import BuiltEngine
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split
    from vlmexport.verify.result import ParityReport


@dataclass(frozen=True)
class TrtResult:
    """A finished export, its plan, the engines that were built and, when the gate ran, what it said.

    ``artifact.path`` is the folder asked for, or ``<folder>.failed`` when the gate turned red. ``plan.engines`` has the
    reason where no engine could be built, also where one was tried. `warnings` are the lint's, one line each.
    """

    artifact: Artifact
    plan: TrtPlan
    built: tuple[BuiltEngine, ...]
    report: ParityReport | None
    warnings: tuple[str, ...] = ()


def export_trt(
    model: str,
    out: Path,
    options: TrtOptions,
    *,
    calibration: CalibrationOptions | None = None,
    force: bool,
    verify: bool,
    progress: Progress,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> TrtResult:
    """Export `model` for TensorRT into the folder `out`.

    Raises `BadInputError` for input that cannot be exported or does not fit the GPU (nothing is written),
    `UnsupportedModelError` for a graph that TensorRT's parser would refuse, and `NotPossibleHereError` where engines
    were asked for and cannot be built here; a build that fails without having been asked for is in the result, as is a
    red gate.
    """
    from vlmexport.lower.tensorrt.build import rtx_version

    check_destination(out, force)
    failed = out.with_name(out.name + ".failed")
    check_destination(failed, True)
    version = rtx_version()
    check_trt_options(options, version)
    vlm, split = load_and_split(model, trust_remote_code, progress, lora=lora)
    plan = plan_trt(vlm, split, options, version)
    with build_beside(out) as workspace, calibration_folder(out) as work:
        weights, calibrated = decoder_weights(
            vlm,
            split,
            plan.export.schemes,
            calibration or CalibrationOptions(),
            work,
            progress,
            plan.export.requantized,
        )
        artifact, plan, built, warnings = _write(vlm, split, plan, weights, calibrated, workspace, progress)
        del weights, vlm, split  # the gate loads its own reference
        report = None
        if verify:
            report = _verify(artifact, model, lora, trust_remote_code, progress)
            results = {**artifact.manifest.results, "verify": report.to_dict()}
            write_proof(workspace, report.to_dict())
            artifact = write_manifest(workspace, dataclasses.replace(artifact.manifest, results=results))
        destination = failed if report is not None and report.status == "failed" else out
        move_into_place(workspace, destination)
    return TrtResult(Artifact(destination, artifact.manifest), plan, built, report, warnings)


def _write(
    vlm: VLM,
    split: Split,
    plan: TrtPlan,
    weights: Any,
    calibrated: dict[str, Any] | None,
    folder: Path,
    progress: Progress,
) -> tuple[Artifact, TrtPlan, tuple[BuiltEngine, ...], tuple[str, ...]]:
    """Graphs, lint, engines, scripts, then the manifest over all of them.

    Also what became of the plan's engines, and the lint's warnings.
    """
    from vlmexport.lower import emitter
    from vlmexport.package import package
    from vlmexport.trt_card import trt_card

    target = load_target(TARGET)
    emitted: Emitted = emitter("onnx", "tensorrt")(vlm, split, plan.export, target, weights, folder, progress)
    specs = engine_specs(emitted.parts, plan.limits, plan.vision_axes, split_decoder=plan.options.two_decoders)
    with progress.stage("lint"):
        warnings = _lint(folder, emitted, specs, plan.gpu.weights)
    plan, built = _build(folder, emitted, specs, plan, progress)
    facts = {"tensorrt": _facts(plan, specs, built)}
    with progress.stage("package"):
        _write_tools(folder, vlm, split, emitted, specs, plan, facts["tensorrt"])
        artifact = package(vlm, split, plan.export, target, emitted, folder, calibrated, facts=facts, card=trt_card)
    return artifact, plan, built, warnings


def _lint(folder: Path, emitted: Emitted, specs: Iterable[EngineSpec], weights: tuple[str, ...]) -> tuple[str, ...]:
    """The warnings of all graphs; `UnsupportedModelError` with the errors of all that have some."""
    from vlmexport.lower.tensorrt.lint import require_clean

    profiles: dict[str, tuple[ShapeProfile, ...]] = {}
    for spec in specs:
        profiles[spec.part] = (*profiles.get(spec.part, ()), *spec.profiles)
    warnings, refused = [], []
    for role, part in emitted.parts.items():
        try:
            found = require_clean(folder / part.file, profile=profiles[role], weights=weights)
        except UnsupportedModelError as error:
            refused.append(str(error))
        else:
            warnings += [f"{part.file}: {finding}" for finding in found]
    if refused:
        raise UnsupportedModelError("\n".join(refused))
    return tuple(warnings)


def _build(
    folder: Path, emitted: Emitted, specs: tuple[EngineSpec, ...], plan: TrtPlan, progress: Progress
) -> tuple[TrtPlan, tuple[BuiltEngine, ...]]:
    """All engines, or none and the plan with the reason; raises only where engines were asked for."""
    from vlmexport.lower.tensorrt.build import build_engines

    if not plan.engines.builder:
        return plan, ()
    gpu = None if plan.options.portable else plan.gpu
    try:
        return plan, build_engines(folder, specs, emitted.parts, gpu, progress, flavour=plan.engines.builder)
    except VlmExportError as error:
        if plan.options.engines or plan.options.backend == "rtx":
            raise
        shutil.rmtree(folder / ENGINES_FOLDER, ignore_errors=True)
        reason = " ".join(str(error).split()).rstrip(".")
        return dataclasses.replace(plan, engines=EngineDecision("", reason)), ()


def _facts(plan: TrtPlan, specs: Iterable[EngineSpec], built: tuple[BuiltEngine, ...]) -> dict[str, Any]:
    """``model.tensorrt`` of the manifest."""
    places = sorted({engine.place for engine in built})
    return {
        "gpu": plan.gpu.name,
        "gpu_title": plan.gpu.title,
        "compute_capability": plan.gpu.compute_capability,
        "limits": dataclasses.asdict(plan.limits),
        "engines": [spec.to_dict() for spec in specs],
        "built": {
            "flavour": plan.engines.builder,
            "version": built[0].version if built else "",
            "places": places,
            "reason": plan.engines.reason,
        },
        "prediction": {**plan.prediction.to_dict(), "lines": plan.prediction.lines()},
    }


def _write_tools(
    folder: Path,
    vlm: VLM,
    split: Split,
    emitted: Emitted,
    specs: tuple[EngineSpec, ...],
    plan: TrtPlan,
    facts: dict[str, Any],
) -> None:
    """The scripts for the machine with the GPU and, when asked for, the Triton repository."""
    from vlmexport.lower.tensorrt.script import write_build_scripts
    from vlmexport.lower.tensorrt.triton import write_triton

    write_build_scripts(folder, facts, emitted.parts, specs, plan.gpu)
    if plan.options.triton:
        write_triton(
            folder,
            emitted.parts,
            specs,
            plan.limits,
            plan.options.triton,
            merge=split.merge,
            eos_token_ids=vlm.facts.eos_token_ids,
        )


def _verify(
    artifact: Artifact, model: str, lora: str | None, trust_remote_code: bool, progress: Progress
) -> ParityReport:
    from vlmexport.verify.run import verify_artifact

    return verify_artifact(
        artifact.path, model=model, lora=lora, samples=None, progress=progress, trust_remote_code=trust_remote_code
    )
