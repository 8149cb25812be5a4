"""The work on one decoder layer: move scales where that is proven, then round every matrix that has a scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from vlmexport.calibrate.folding import FoldPlan, FoldSite, Measure, move_scales
from vlmexport.calibrate.sites import SiteStatistics
from vlmexport.calibrate.working import WorkingLayer
from vlmexport.quantize.calibrated import RoundingReport, quantize_group, search_scale
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputPower, InputStatistics
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.split.matrices import PACKED_AXES, Matrix, matrices_of

_UNSEEN = "no calibration token reached it"
Rounded: TypeAlias = tuple[dict[str, QuantizedTensor], dict[str, RoundingReport]]


@dataclass(frozen=True)
class LayerTask:
    """A layer to be quantized: its float32 parameters, what its matrices read, and the schemes by parameter name.

    `prefix` and a parameter's name make its whole-model name.
    """

    prefix: str
    work: WorkingLayer
    statistics: SiteStatistics
    schemes: Mapping[str, QuantScheme]

    def matrices(self, parameters: Sequence[str]) -> list[Matrix]:
        """The matrices of some parameters."""
        return matrices_of((name, self.work.parameters[name]) for name in parameters)

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The matrix as it is now, folds applied."""
        return matrix.of(self.work.parameters[matrix.parameter])

    def inputs(self, matrix: Matrix) -> InputStatistics | None:
        """What `matrix` reads after the folds so far; None when nothing was seen."""
        seen, factor = self.statistics.of(matrix), self._input_factor(matrix)
        return seen if seen is None or factor is None else seen.scaled(factor)

    def powers(self) -> dict[str, InputPower]:
        """The power of what every matrix of the layer reads after the folds so far, by name inside the layer."""
        found = {}
        for matrix, seen in self.statistics.seen():
            factor = self._input_factor(matrix)
            found[matrix.name] = seen.power() if factor is None else seen.power().scaled(factor)
        return found

    def _input_factor(self, matrix: Matrix) -> torch.Tensor | None:
        """What the folds multiplied the inputs of `matrix` by, ``[K]``; None without a fold."""
        fold = self.work.folds.get(matrix.parameter)
        if fold is None or fold.columns is None:
            return None
        per_expert = fold.columns.ndim > 1 and matrix.expert is not None
        return 1 / (fold.columns[matrix.expert] if per_expert else fold.columns)


def fold_layer(task: LayerTask, plan: FoldPlan, difference: Measure) -> list[dict[str, Any]]:
    """Search scales for every proven site and move them where the layer's output stays; one report row per site."""
    rows = [{"site": site, "done": False, "reason": reason} for site, reason in plan.refused.items()]
    for site in plan.sites:
        scale = _search(task, site)
        reason = "no factor is better than none" if scale is None else move_scales(task.work, site, scale, difference)
        rows.append({"site": site.label, "done": not reason, "reason": reason})
    return rows


def smooths(scheme: QuantScheme) -> bool:
    """True when the scheme's algorithm wants scales moved."""
    return algorithm(scheme.algorithm).smooths


def _search(task: LayerTask, site: FoldSite) -> torch.Tensor | None:
    """Scales ``[K]`` for all readers together, or ``[E, K]`` where every expert has a maker of its own."""
    matrices = task.matrices(site.readers)
    chosen = [m for m in matrices if m.parameter in task.schemes]
    if not any(smooths(task.schemes[m.parameter]) for m in chosen):
        return None
    if task.work.parameters[site.maker].ndim == PACKED_AXES:
        found = [_together(task, [m], [m]) for m in chosen]
        if all(scale is None for scale in found):
            return None
        return torch.stack([torch.ones(site.stop - site.start) if scale is None else scale for scale in found])
    return _together(task, chosen, matrices)


def _together(task: LayerTask, chosen: list[Matrix], readers: list[Matrix]) -> torch.Tensor | None:
    seen = [s for m in readers if (s := task.statistics.of(m)) is not None]
    if not seen:
        return None
    # Experts see a part of the tokens each; the reader of them all (the router) speaks for the site.
    richest = max(seen, key=lambda statistics: statistics.tokens)
    return search_scale([task.weight(m) for m in chosen], richest, [task.schemes[m.parameter] for m in chosen])


def leave_float(_task: LayerTask) -> Rounded:
    """Round nothing: only the folds are wanted."""
    return {}, {}


def round_layer(task: LayerTask) -> Rounded:
    """Round every matrix with a scheme and put its dequantized weight into the layer; by name inside the layer."""
    codes: dict[str, QuantizedTensor] = {}
    reports: dict[str, RoundingReport] = {}
    for group in _groups(task):
        seen = task.inputs(group[0])
        weights = [task.weight(m) for m in group]
        statistics = InputStatistics.empty(weights[0].shape[1]) if seen is None else seen
        schemes = [task.schemes[m.parameter] for m in group]
        made = quantize_group(weights, statistics, schemes, [task.prefix + m.name for m in group])
        for matrix, weight, scheme, (quantized, report) in zip(group, weights, schemes, made, strict=True):
            weight.copy_(quantized.dequantize())
            unseen = seen is None and algorithm(scheme.algorithm).calibrated
            codes[matrix.name] = quantized
            reports[matrix.name] = dataclasses.replace(report, fallback=_UNSEEN) if unseen else report
    return codes, reports


def _groups(task: LayerTask) -> list[list[Matrix]]:
    """The matrices with schemes: those that share an input together, those that were never used alone."""
    groups = [[m for m in members if m.parameter in task.schemes] for _, members in task.statistics.sites()]
    unseen = [[m] for m in task.matrices(list(task.schemes)) if task.statistics.of(m) is None]
    return [group for group in groups + unseen if group]
