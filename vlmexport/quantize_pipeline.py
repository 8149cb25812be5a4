"""The pipeline of ``vlmexport quantize``: load, split, plan, calibrate, write the checkpoint, verify.

As with an export, the folder is built beside its destination and renamed when it is finished; finished layers are kept
when the work is interrupted, so the same command again goes on from there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.calibrate.auto import settle_choice
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.card_proof import write_proof
from vlmexport.checkpoint_card import checkpoint_card
from vlmexport.checkpoint_manifest import CHECKPOINT_MANIFEST_NAME, CheckpointManifest, write_checkpoint_manifest
from vlmexport.checkpoint_plan import CheckpointOptions, CheckpointPlan, check_checkpoint_options, plan_checkpoint
from vlmexport.errors import BadInputError
from vlmexport.manifest import KeptTensor
from vlmexport.pipeline import load_and_split
from vlmexport.plan_file import PLAN_NAME, AutoLimit, QuantPlan
from vlmexport.progress import Progress
from vlmexport.workspace import build_beside, calibration_folder, check_destination, move_into_place

if TYPE_CHECKING:
    from vlmexport.lower.checkpoint.emit import EmittedCheckpoint
    from vlmexport.model.load import VLM
    from vlmexport.plan import WeightPlan
    from vlmexport.quantize.scheme import QuantScheme
    from vlmexport.split.parts import Split
    from vlmexport.verify.result import ParityReport


@dataclass(frozen=True)
class CheckpointResult:
    """A finished checkpoint and, when it was verified, what that said.

    `path` is the folder asked for, or ``<folder>.failed`` when a check failed. `quant_plan` is the choice of bits that
    was made or given; the checkpoint holds it as ``quantization_plan.json``.
    """

    path: Path
    manifest: CheckpointManifest
    report: ParityReport | None
    quant_plan: QuantPlan | None = None


def quantize_checkpoint(
    model: str,
    out: Path,
    options: CheckpointOptions,
    *,
    calibration: CalibrationOptions | None = None,
    force: bool,
    verify: bool,
    progress: Progress,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> CheckpointResult:
    """Write `model` into the folder `out` as a Hugging Face checkpoint with a quantized decoder.

    Raises `BadInputError` for input that cannot be quantized so (nothing is written), `NotPossibleHereError` when the
    disk is full or read-only. A failed check is not raised: it is in the result, and the folder is ``<out>.failed``.
    """
    check_destination(out, force, CHECKPOINT_MANIFEST_NAME)
    failed = out.with_name(out.name + ".failed")
    check_destination(failed, True, CHECKPOINT_MANIFEST_NAME)
    check_checkpoint_options(options)
    vlm, split = load_and_split(model, trust_remote_code, progress, lora=lora)
    chosen = calibration or CalibrationOptions()
    if options.choice is None:
        _check_any(plan_checkpoint(vlm, split, options))  # refuses before finished layers are at stake
    with build_beside(out) as workspace, calibration_folder(out) as work:
        options, quant_plan = _settle_bits(vlm, split, options, chosen, work, progress)
        plan = _check_any(plan_checkpoint(vlm, split, options))
        from vlmexport.lower.checkpoint.emit import emit_checkpoint
        from vlmexport.lower.checkpoint.names import names_for

        names = names_for(vlm, plan)  # refuses before the calibration what could not be written after it
        weights, calibrated = decoder_weights(vlm, split, plan.schemes, chosen, work, progress)
        emitted = emit_checkpoint(vlm, plan, names, weights, workspace, progress)
        if quant_plan is not None:
            quant_plan.write(workspace / PLAN_NAME)
        manifest = _package(vlm, plan, emitted, calibrated, workspace)
        del weights, vlm, split  # the checks load models of their own: two in memory would be one too many
        report = None
        if verify:
            report = _verify(workspace, model, lora, trust_remote_code, progress)
            results = {"verify": report.to_dict()}
            write_proof(workspace, report.to_dict())
            manifest = write_checkpoint_manifest(workspace, dataclasses.replace(manifest, results=results))
        destination = failed if report is not None and report.status == "failed" else out
        move_into_place(workspace, destination)
    return CheckpointResult(destination, manifest, report, quant_plan)


def _check_any(plan: CheckpointPlan) -> CheckpointPlan:
    """`plan`, unless it quantizes nothing: a config that names codes where there are none means nothing."""
    if not plan.schemes:
        raise BadInputError(
            "no weight is left to be quantized; take back some --keep, or give --max-kl more or --max-size less"
        )
    return plan


def _settle_bits(
    vlm: VLM,
    split: Split,
    options: CheckpointOptions,
    calibration: CalibrationOptions,
    work: Path,
    progress: Progress,
) -> tuple[CheckpointOptions, QuantPlan | None]:
    """`options` with the bits of every weight settled, and the plan that says so (None: there was nothing to settle).

    Raises `BadInputError` as `vlmexport.calibrate.auto.settle_choice` does.
    """
    if options.choice is None:
        return options, None
    if isinstance(options.choice, AutoLimit):
        _check_measurable(vlm, split)
    plain = dataclasses.replace(options, choice=None)

    def planner(scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
        asked = dataclasses.replace(plain, scheme=scheme, keep=(*plain.keep, *keep))
        return plan_checkpoint(vlm, split, asked).weights

    plan = settle_choice(vlm, split, planner, plain.scheme, options.choice, calibration, work, progress)
    return plan.apply(plain), plan


def _check_measurable(vlm: VLM, split: Split) -> None:
    """Refuse to choose bits for packed experts, whose effects the sensitivity does not measure."""
    from vlmexport.split.experts import packed_parameters
    from vlmexport.split.parts import Role

    experts = packed_parameters(vlm.model, split.parts[Role.DECODER].module)
    if experts:
        raise BadInputError(
            f"--quant auto does not measure what rounding packed experts does ({next(iter(experts))}); choose --quant "
            "and --bits"
        )


def _package(
    vlm: VLM,
    plan: CheckpointPlan,
    emitted: EmittedCheckpoint,
    calibration: dict[str, Any] | None,
    folder: Path,
) -> CheckpointManifest:
    """Add the model's own files, the card and the manifest; ``config.json`` is the emitter's."""
    from vlmexport.package import copy_model_files, source_facts, tool_versions

    config = (folder / "config.json").read_bytes()
    copy_model_files(vlm.path, folder)
    (folder / "config.json").write_bytes(config)
    manifest = CheckpointManifest(
        checkpoint_format=plan.options.format,
        created_by=tool_versions(),
        source=source_facts(vlm),
        plan=plan.to_dict(),
        quantized=emitted.quantized,
        unquantized=tuple(KeptTensor(w.name, w.part, w.dtype, w.reason) for w in plan.weights if w.scheme is None),
        folded=emitted.folded,
        calibration=calibration,
    )
    (folder / "README.md").write_text(checkpoint_card(manifest, vlm.path), encoding="utf-8")
    return write_checkpoint_manifest(folder, manifest)


def _verify(folder: Path, model: str, lora: str | None, trust_remote_code: bool, progress: Progress) -> ParityReport:
    from vlmexport.verify.checkpoint import verify_checkpoint

    return verify_checkpoint(folder, model, progress, lora=lora, trust_remote_code=trust_remote_code)
