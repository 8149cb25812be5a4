"""The pipeline: load, split, plan, lower, package, verify. Each stage takes typed inputs; this file is the list.

An export is built in a temporary folder beside its destination and renamed when it is finished, so a failure, a full
disk or Ctrl-C leaves nothing half written and an older export intact.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.manifest import MANIFEST_NAME, Artifact, write_manifest
from vlmexport.plan import ExportPlan, OnnxOptions, check_options, plan_export
from vlmexport.progress import Progress
from vlmexport.target import Target, load_target

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split
    from vlmexport.verify.result import ParityReport


@dataclass(frozen=True)
class ExportResult:
    """A finished export and, when the gate ran, what it said.

    ``artifact.path`` is the folder asked for, or ``<folder>.failed`` when the gate turned red.
    """

    artifact: Artifact
    report: ParityReport | None


def export_onnx(
    model: str,
    out: Path,
    options: OnnxOptions,
    *,
    force: bool,
    verify: bool,
    progress: Progress,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Export `model` into the folder `out`.

    Raises `BadInputError` for input that cannot be exported (nothing is written), `NotPossibleHereError` when the disk
    is full or read-only. A red gate is not raised: it is in the result, and the export is in ``<out>.failed``.
    """
    failed = out.with_name(out.name + ".failed")
    _check_destination(out, force)
    _check_destination(failed, True)  # an earlier failed export may be replaced, a folder of the user's may not
    target = load_target(options.target)
    check_options(options, target)
    vlm, split = _load_and_split(model, trust_remote_code, progress)
    plan = plan_export(vlm, split, target, options)
    with _workspace(out) as workspace:
        artifact = _lower_and_package(vlm, split, plan, target, workspace, progress)
        del vlm, split  # the gate loads its own reference: two models in memory would be one too many
        report = None
        if verify:
            report = _verify(artifact, model, trust_remote_code, progress)
            results = {**artifact.manifest.results, "verify": report.to_dict()}
            artifact = write_manifest(workspace, dataclasses.replace(artifact.manifest, results=results))
        red = report is not None and report.status == "failed"
        destination = failed if red else out
        _move_into_place(workspace, destination)
    return ExportResult(Artifact(destination, artifact.manifest), report)


def _load_and_split(model: str, trust_remote_code: bool, progress: Progress) -> tuple[VLM, Split]:
    from vlmexport.model.load import load_vlm
    from vlmexport.split.capture import split_model

    with progress.stage("load model"):
        vlm = load_vlm(model, trust_remote_code=trust_remote_code)
    with progress.stage("split and replay"):
        return vlm, split_model(vlm)


def _lower_and_package(
    vlm: VLM, split: Split, plan: ExportPlan, target: Target, folder: Path, progress: Progress
) -> Artifact:
    from vlmexport.lower import emitter
    from vlmexport.package import package

    emitted = emitter("onnx", plan.options.layout)(vlm, split, plan, target, folder, progress)
    with progress.stage("package"):
        return package(vlm, split, plan, target, emitted, folder)


def _verify(artifact: Artifact, model: str, trust_remote_code: bool, progress: Progress) -> ParityReport:
    from vlmexport.verify.run import verify_artifact

    return verify_artifact(
        artifact.path, model=model, samples=None, progress=progress, trust_remote_code=trust_remote_code
    )


def _check_destination(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise BadInputError(f"{out} is a file; give a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST_NAME).is_file():
        raise BadInputError(f"{out} is not empty and not a vlmexport export; choose another folder with --out")
    if not force:
        raise BadInputError(f"--out {out} already holds an export; use --force to replace it, or choose another folder")


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, gone afterwards unless it was moved into place."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise NotPossibleHereError(f"cannot write beside {out}: {error.strerror}") from error
    folder.chmod(0o755)
    try:
        yield folder
    except OSError as error:
        raise NotPossibleHereError(f"cannot write the export to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(workspace: Path, destination: Path) -> None:
    """Rename `workspace` to `destination`; an older export there is removed only after the new one stands."""
    old = None
    if destination.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent))
        destination.rename(old / destination.name)
    try:
        workspace.rename(destination)
    except OSError:
        if old is not None:
            (old / destination.name).rename(destination)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
