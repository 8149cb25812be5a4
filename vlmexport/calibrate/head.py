"""The last step of a calibration: the LM head, and weights with schemes that are outside the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.calibrate.store import Step
from vlmexport.quantize.calibrated import RoundingReport, quantize_calibrated, quantize_group
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputStatistics
from vlmexport.quantize.tensor import QuantizedTensor, stack_rows
from vlmexport.split.names import module_path, weight_names

if TYPE_CHECKING:
    from vlmexport.split.decoder import DecoderPart

# Values of the LM head that are in float32 at a time; its rows are rounded independently.
_CHUNK = 1 << 26
_OUTSIDE = "it is outside the repeated layers, where nothing was observed"


def quantize_rest(
    model: nn.Module,
    part: DecoderPart,
    schemes: Mapping[str, QuantScheme],
    finals: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Step:
    """Round the calibrated weights of `schemes` (by whole-model name), none of which is in a layer.

    `finals` are the LM head's inputs ``[B, S, H]`` with their valid positions bool ``[B, S]``. Nothing is folded: the
    head may be the embedding table. Data-free schemes are left to `DecoderWeights`.
    """
    tensors = weight_names(model, part)
    head = f"{module_path(model, part.head)}.weight"
    codes: dict[str, QuantizedTensor] = {}
    reports: dict[str, RoundingReport] = {}
    for name, scheme in schemes.items():
        if not algorithm(scheme.algorithm).calibrated:
            continue
        if name == head:
            codes[name], reports[name] = _round_rows(tensors[name], _statistics(tensors[name], finals), scheme, name)
        else:
            nothing = InputStatistics.empty(tensors[name].shape[1])
            made, report = quantize_calibrated(tensors[name].float(), nothing, scheme, name)
            codes[name], reports[name] = made, dataclasses.replace(report, fallback=_OUTSIDE)
    rows: dict[str, Any] = {name: dataclasses.asdict(report) for name, report in reports.items()}
    return Step(codes, {}, {"layer": "after the layers", "folds": [], "weights": rows})


def _statistics(weight: torch.Tensor, finals: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> InputStatistics:
    statistics = InputStatistics.empty(weight.shape[1])
    for hidden, valid in finals:
        statistics.add(hidden[valid])
    return statistics


def _round_rows(
    weight: torch.Tensor, statistics: InputStatistics, scheme: QuantScheme, name: str
) -> tuple[QuantizedTensor, RoundingReport]:
    """Round ``weight [N, K]`` some rows at a time; the error is their mean, weighted by the rows' power."""
    chunks = weight.split(max(_CHUNK // weight.shape[1], 1))  # type: ignore[no-untyped-call]
    made = quantize_group(chunks, statistics, [scheme] * len(chunks), [name] * len(chunks))
    power = [float(rows.float().square().sum()) for rows in chunks]
    error = sum(report.error * p for (_, report), p in zip(made, power, strict=True)) / max(sum(power), 1e-30)
    return stack_rows([codes for codes, _ in made]), dataclasses.replace(made[0][1], error=error)
