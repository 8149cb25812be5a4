"""What ``vlmexport gguf`` needs of the calibration stage, in one pass: codes, moved scales, the importance matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.calibrate.imatrix import (
    after_folds,
    check_imatrix,
    coverage,
    importance_matrix,
    measure_importance,
    quantized_layers,
    weighted_layers,
)
from vlmexport.calibrate.layer import leave_float
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.gguf_options import GgufPlan
from vlmexport.model.family import MetaValue
from vlmexport.progress import Progress
from vlmexport.quantize.ggml.imatrix import ImportanceMatrix, read_imatrix
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights

if TYPE_CHECKING:
    import torch

    from vlmexport.calibrate.loop import Calibrated
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

# What AWQ's search takes for the rounding of a K-quant: as Q4_K, 32 columns share a scale and an offset.
SMOOTHING = QuantScheme(bits=4, symmetric=False, group_size=32, algorithm="awq")
_LONGEST_FACT = 127  # bytes that llama-quantize keeps of a file or dataset name


@dataclass(frozen=True)
class GgufWeights:
    """The decoder's weights as they are to be stored, and how much their columns count.

    `imatrix` is the matrix that was used (None: none), `importance` its means by GGUF tensor name as the tensors need
    them: float32 ``[columns]``, or ``[experts, columns]``. `source` is its file (empty when it was calibrated here).
    `report` is the manifest's account of the calibration (None: none ran), `notes` are lines for people.
    """

    weights: DecoderWeights
    imatrix: ImportanceMatrix | None = None
    importance: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    source: str = ""
    report: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def imatrix_origin(self) -> str:
        """Where the importance matrix is from, in a few words; empty without one."""
        if self.imatrix is None:
            return ""
        return f"read from {Path(self.source).name}" if self.source else "; ".join(self.imatrix.datasets)

    @cached_property
    def facts(self) -> dict[str, MetaValue]:
        """The ``quantize.imatrix.*`` keys that llama-quantize would write; empty without an importance matrix."""
        if self.imatrix is None:
            return {}
        facts: dict[str, MetaValue] = {"quantize.imatrix.file": _short(self.source or "calibrated by vlmexport")}
        if self.imatrix.datasets:
            facts["quantize.imatrix.dataset"] = _short(self.imatrix.datasets[0])
        facts["quantize.imatrix.entries_count"] = len(self.imatrix.powers)
        if self.imatrix.chunks:
            facts["quantize.imatrix.chunks_count"] = self.imatrix.chunks
        return facts


def _short(text: str) -> str:
    return text.encode()[:_LONGEST_FACT].decode(errors="ignore")


def gguf_decoder_weights(
    vlm: VLM, plan: GgufPlan, options: CalibrationOptions, work: Path, progress: Progress
) -> GgufWeights:
    """Run what the plan's options ask for, and no more: the model is split and calibrated only where that is needed.

    `work` is a folder for finished layers (see `vlmexport.calibrate.stage.decoder_weights`). Raises `BadInputError` for
    an importance matrix of another model, for a type that needs one and has none, and for samples that cannot be used;
    `UnsupportedModelError` when the model cannot be calibrated.
    """
    asked = plan.options
    matrix = read_imatrix(asked.imatrix) if isinstance(asked.imatrix, Path) else None
    importance = {} if matrix is None else check_imatrix(matrix, plan)
    measures = asked.imatrix == "auto" and bool(weighted_layers(plan))
    coverage(
        [t.name for t in weighted_layers(plan)] if measures else importance, plan
    )  # refuses before the calibration
    tensors = _tensors(vlm, plan)
    made = _calibrate(vlm, plan, tensors, measures, options, work, progress)
    weights = _weights(vlm, plan, tensors, made)
    if measures and made is not None:
        matrix = importance_matrix(made.powers, plan, tensors, [_dataset(made.report)])
        importance = matrix.entries
    elif matrix is not None:
        importance = after_folds(importance, plan, weights.folds)
    note = coverage(importance, plan).note if matrix is not None else ""
    return GgufWeights(
        weights,
        matrix,
        importance,
        source=str(asked.imatrix) if isinstance(asked.imatrix, Path) else "",
        report=None if made is None else made.report,
        notes=(note,) if note else (),
    )


def _tensors(vlm: VLM, plan: GgufPlan) -> dict[str, torch.Tensor]:
    """The weights that the text model's tensors are made of, by their names in the whole model."""
    sources = {tensor.source for tensor in plan.of("text")}
    every = vlm.model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in every.items() if name in sources}


def _weights(vlm: VLM, plan: GgufPlan, tensors: Mapping[str, torch.Tensor], made: Calibrated | None) -> DecoderWeights:
    if vlm.quantized is not None and plan.schemes:
        return DecoderWeights(tensors, plan.schemes, vlm.quantized.codes)
    if made is None:
        return DecoderWeights(tensors, plan.schemes)
    return DecoderWeights(tensors, plan.schemes, made.quantized, made.folds)


def _calibrate(
    vlm: VLM,
    plan: GgufPlan,
    tensors: Mapping[str, torch.Tensor],
    measures: bool,
    options: CalibrationOptions,
    work: Path,
    progress: Progress,
) -> Calibrated | None:
    """The one pass over the samples that the plan needs; None when it needs none."""
    rounds = vlm.quantized is None and any(scheme.calibrated for scheme in plan.schemes.values())
    smooths = plan.options.smooth == "awq"
    if smooths:
        _check_smoothing(plan)
    if not (rounds or smooths or measures):
        return None
    try:
        from vlmexport.split.capture import split_model

        with progress.stage("split and replay"):
            split = split_model(vlm)
        if smooths:
            return smoothed_weights(vlm, split, smoothing_schemes(plan, tensors), options, work, progress)
        if rounds:
            from vlmexport.calibrate.loop import calibrate_decoder

            return calibrate_decoder(vlm, split, plan.schemes, options, work, progress)
        return measure_importance(vlm, split, options, work, progress)
    except UnsupportedModelError as error:
        if rounds or smooths:
            raise
        raise UnsupportedModelError(
            f"{error}; it can be exported without an importance matrix: --imatrix none"
        ) from error


def _check_smoothing(plan: GgufPlan) -> None:
    if plan.schemes:
        raise BadInputError("--smooth awq is for file types such as Q4_K_M; with codes choose --quant awq or awq+gptq")
    if not quantized_layers(plan):
        raise BadInputError(f"--smooth awq has no effect with {plan.options.quant}, which quantizes no layer")


def smoothing_schemes(plan: GgufPlan, tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantScheme]:
    """`SMOOTHING` for every weight of the plan's quantized layers, by its name, that its groups divide."""
    sources = [tensor.source for tensor in quantized_layers(plan)]
    return {name: SMOOTHING for name in sources if tensors[name].shape[-1] % SMOOTHING.group_size == 0}


def smoothed_weights(
    vlm: VLM,
    split: Split,
    schemes: Mapping[str, QuantScheme],
    options: CalibrationOptions,
    work: Path,
    progress: Progress,
) -> Calibrated:
    """Scales moved as `schemes` (by weight name) ask for, nothing rounded: a model of the same function.

    AWQ must know a rounding to judge its scales by. K-quants search their scales block by block, which is too slow to
    try for every candidate, so `schemes` hold a stand-in (`SMOOTHING`). The powers are of the folded model's inputs.
    Errors are those of `vlmexport.calibrate.loop.calibrate_decoder`.
    """
    from vlmexport.calibrate.loop import calibrate_decoder

    return calibrate_decoder(vlm, split, schemes, options, work, progress, finish=leave_float)


def _dataset(report: Mapping[str, Any]) -> str:
    """What a calibration was made on, in a few words."""
    images = "text only" if report["recipe"]["text_only"] else f"{report['image_share']:.0%} image tokens"
    return f"vlmexport {report['recipe']['name']}, {report['samples']} samples, seed {report['seed']}, {images}"
