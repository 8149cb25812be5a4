"""The importance matrix: measured on our multimodal calibration, or checked against a plan when it comes from a file.

What llama.cpp's ``llama-imatrix`` measures on text alone: the mean square of every input feature of every matrix in
the decoder's layers, in the model as it is. The LM head and the embedding table have none, as by its default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.errors import BadInputError
from vlmexport.gguf_options import GgufPlan, GgufTensor
from vlmexport.progress import Progress
from vlmexport.quantize.fold import Fold
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.imatrix import ColumnPower, ImportanceMatrix, chunks_of
from vlmexport.quantize.ggml.types import NEEDS_IMPORTANCE, ggml_type
from vlmexport.quantize.statistics import InputPower
from vlmexport.split.matrices import PACKED_AXES

if TYPE_CHECKING:
    from vlmexport.calibrate.loop import Calibrated
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

_LAYER = re.compile(r"blk\.(\d+)\.")


def measure_importance(
    vlm: VLM, split: Split, options: CalibrationOptions, work: Path, progress: Progress
) -> Calibrated:
    """``powers`` of what every matrix of the decoder's layers reads, by weight name; nothing in the model changes.

    Packed experts have one each, ``<parameter>.<expert>``; those that no token reached have none. One float32 layer is
    in memory at a time. Errors are those of `vlmexport.calibrate.loop.calibrate_decoder`.
    """
    from vlmexport.calibrate.loop import calibrate_decoder

    return calibrate_decoder(vlm, split, {}, options, work, progress)


def importance_matrix(
    powers: Mapping[str, InputPower], plan: GgufPlan, weights: Mapping[str, torch.Tensor], datasets: Sequence[str]
) -> ImportanceMatrix:
    """`powers`, by weight name, as the matrix of the plan's text tensors; columns in the order that they have there.

    `weights` are those that the tensors are made of (only their shapes are looked at).
    """
    found: dict[str, ColumnPower] = {}
    for tensor in plan.of("text"):
        power = _column_power(tensor, powers, weights[tensor.source]) if tensor.source in weights else None
        if power is not None:
            found[tensor.name] = power
    return ImportanceMatrix(found, tuple(datasets), chunks_of(found))


def _column_power(tensor: GgufTensor, powers: Mapping[str, InputPower], weight: torch.Tensor) -> ColumnPower | None:
    """The power of one tensor's columns; None when nothing was seen or its columns are not the weight's."""
    packed = weight.ndim == PACKED_AXES
    names = [f"{tensor.source}.{expert}" for expert in range(weight.shape[0])] if packed else [tensor.source]
    seen = [powers.get(name) for name in names]
    if all(power is None for power in seen) or len(tensor.shape) != weight.ndim:
        return None
    order = _column_order(tensor, weight.shape)
    if order is None:
        return None
    sums = [np.zeros(len(order), np.float32) if p is None else p.squares.float().cpu().numpy()[order] for p in seen]
    return ColumnPower(np.stack(sums), np.array([0 if p is None else p.tokens for p in seen], np.int64))


def _column_order(tensor: GgufTensor, shape: torch.Size) -> NDArray[np.int64] | None:
    """The weight's column of every column of `tensor`, found by sending the columns' numbers through its transform.

    None where the transform does not keep columns together.
    """
    kind, arguments = (tensor.transform.kind, tensor.transform.arguments) if tensor.transform else (None, ())
    natural = torch.arange(shape[-1], dtype=torch.int32)
    if values.moves_rows_only(kind):
        return natural.numpy().astype(np.int64)
    made = values.apply(natural.expand(shape), kind, arguments)[tensor.output]
    order = made.reshape(-1, made.shape[-1])[0]
    whole = made.shape[-1] == shape[-1] and bool((made == order).all()) and torch.equal(order.sort().values, natural)
    return order.numpy().astype(np.int64) if whole else None


@dataclass(frozen=True)
class Coverage:
    """Which of the tensors that a plan quantizes an importance matrix knows: how many, and the names of the others."""

    covered: int
    missing: tuple[str, ...]

    @property
    def note(self) -> str:
        """One line for people; empty when none is missing."""
        if not self.missing:
            return ""
        total = self.covered + len(self.missing)
        return (
            f"the importance matrix covers {self.covered} of {total} quantized tensors; the others (first: "
            f"{self.missing[0]}) are quantized as if all their columns were alike"
        )


def quantized_layers(plan: GgufPlan) -> list[GgufTensor]:
    """The matrices of the text model's layers that are quantized from floats: those that importance is about."""
    return [
        t for t in plan.of("text")
        if t.scheme is None and len(t.shape) > 1 and _LAYER.match(t.name) and ggml_type(t.type).block > 1
    ]  # fmt: skip


def weighted_layers(plan: GgufPlan) -> list[GgufTensor]:
    """Those whose bytes importance changes: ggml's Q8_0 does not look at it."""
    return [tensor for tensor in quantized_layers(plan) if tensor.type != "Q8_0"]


def coverage(names: Iterable[str], plan: GgufPlan) -> Coverage:
    """What an importance matrix of the tensors `names` covers.

    Raises `BadInputError` for a tensor that it must cover: of a type that is made with an importance matrix only.
    """
    known = set(names)
    for tensor in plan.of("text"):
        if tensor.type in NEEDS_IMPORTANCE and tensor.scheme is None and tensor.name not in known:
            raise BadInputError(
                f"{tensor.name} is to be {tensor.type}, which needs an importance matrix, and has none: calibrate one "
                "(--imatrix auto, for the layers' matrices) or choose a larger type"
            )
    wanted = weighted_layers(plan)
    missing = tuple(t.name for t in wanted if t.name not in known)
    return Coverage(len(wanted) - len(missing), missing)


def check_imatrix(matrix: ImportanceMatrix, plan: GgufPlan) -> dict[str, NDArray[np.float32]]:
    """The importance of the plan's text tensors, ``[columns]`` or ``[experts, columns]``, from a matrix of a file.

    Raises `BadInputError` for a matrix of another model: naming the first tensor that this model has not or that has
    another shape here, or the first layer's that it leaves out altogether.
    """
    tensors = {t.name: t for t in plan.of("text")}
    fitted: dict[str, NDArray[np.float32]] = {}
    for name, entry in matrix.entries.items():
        if name not in tensors:
            raise BadInputError(f"the importance matrix is of another model: this one has no tensor {name}")
        fitted[name] = _fitted(name, entry, tensors[name].shape)
    layers = {match.group(1) for name in fitted if (match := _LAYER.match(name))}
    for tensor in quantized_layers(plan):
        match = _LAYER.match(tensor.name)
        if match is not None and match.group(1) not in layers:
            raise BadInputError(f"the importance matrix is of another model: it knows nothing of {tensor.name}")
    return fitted


def _fitted(name: str, entry: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """`entry` in the form of a tensor of `shape`; files of the older form have experts end to end."""
    wanted = shape[:1] + shape[-1:] if len(shape) == PACKED_AXES else shape[-1:]
    if entry.size != np.prod(wanted):
        has = " x ".join(map(str, entry.shape))
        raise BadInputError(
            f"the importance matrix is of another model: it has {has} columns of {name}, which has "
            f"{' x '.join(map(str, wanted))} here"
        )
    return entry.reshape(wanted)


def after_folds(
    importance: Mapping[str, NDArray[np.float32]], plan: GgufPlan, folds: Mapping[str, Fold]
) -> dict[str, NDArray[np.float32]]:
    """The importance of a model whose inputs were divided by the folds' column factors, from that of the original."""
    sources = {t.name: t for t in plan.of("text")}
    changed = dict(importance)
    for name, entry in importance.items():
        fold = folds.get(sources[name].source)
        if fold is not None and fold.columns is not None:
            factor = fold.columns.double().square().cpu().numpy()
            changed[name] = (entry / factor).astype(np.float32)
    return changed
