"""Do the files hold the model's weights? Every value dequantized and compared, and every code of ours unpacked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.gguf_options import GgufTensor
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.types import ggml_type
from vlmexport.target import GgufLimits
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.files import EXACT_TYPES, GgufPair, StoredTensor
from vlmexport.verify.gguf.structure import PARTS

_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Within so many values every type below has one scale, so that rounding keeps their order, whatever chose the scale.
_SUB_BLOCK = 16
# These look values up in a grid of vectors, so order says nothing.
_GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# Blocks so much smaller than their tensor are below what a float16 scale resolves.
_NEGLIGIBLE = 1e-2
_TINY = 1e-30
# More tensors than this, and a larger share, are no damage any more.
_DAMAGED, _FOREIGN_SHARE = 2, 0.1


@dataclass
class Rounding:
    """The rounding error of one tensor, summed over its pieces.

    `worst`: the largest relative RMS error of a block (blocks that are negligible beside the tensor are measured
    against the tensor); `disordered`: neighbours in order of size whose stored values are in the other order.
    """

    error: float = 0.0
    signal: float = 0.0
    worst: float = 0.0
    disordered: int = 0

    @property
    def relative(self) -> float:
        """Relative RMS error of the tensor; inf where there is an error and no signal."""
        if self.signal > 0.0:
            return float(np.sqrt(self.error / self.signal))
        return 0.0 if self.error == 0.0 else float("inf")


def check_values(
    gate: Gate,
    pair: GgufPair,
    tensors: Sequence[GgufTensor],
    weights: Mapping[str, torch.Tensor],
    limits: GgufLimits,
    computed: Mapping[str, Any],
) -> set[str]:
    """``gguf/values[text]`` and ``[mmproj]``: each tensor against the weight of the PyTorch model.

    Floats must be the weight rounded once, exactly. Rounded types must stay within the error that their rounding can
    have, and must keep the order of the values in every sub-block: what another fine-tune does not. Codes of ours are
    judged by `check_codes`. `weights` are the model's by name (as calibration left them), `computed` the values of
    tensors without a source. Returns the names of those that are wrong.
    """
    wrong: set[str] = set()
    for file, part in PARTS.items():
        # An importance matrix guides the text half alone; the mmproj is rounded plainly.
        guided = file == "text" and pair.importance()
        table = limits.weights_importance if guided else limits.weights
        faults = []
        for tensor in (t for t in tensors if t.file == file and t.scheme is None):
            stored = pair.of(file).tensors.get(tensor.name)
            if stored is None or stored.type not in limits.weights:
                continue  # gguf/tensors has said so
            expected = _expected(tensor, weights, computed)
            if expected is None:
                faults.append(f"{tensor.name}: the model has no {tensor.source or 'such computed tensor'}")
                wrong.add(tensor.name)
                continue
            if fault := value_fault(stored, expected, table[stored.type]):
                faults.append(f"{tensor.name}: {fault}")
                wrong.add(tensor.name)
        gate.verdict(f"gguf/values[{file}]", part, "lowering", faults, "tensors that differ")
    return wrong


def check_pairing(gate: Gate, pair: GgufPair, tensors: Sequence[GgufTensor], wrong: Collection[str]) -> None:
    """``gguf/pairing``: both halves are of the model that they are judged against.

    A damaged tensor is one fault of many; a half of another model, or of another fine-tune of it, differs in a good
    part of its tensors (`wrong` are their names).
    """
    faults = []
    for file in PARTS:
        names = [t.name for t in tensors if t.file == file and t.scheme is None]
        differ = sum(name in wrong for name in names)
        if differ > max(_DAMAGED, len(names) * _FOREIGN_SHARE):
            faults.append(f"{pair.of(file).path.name} is of another model: {differ} of {len(names)} tensors differ")
    gate.verdict("gguf/pairing", "model", "lowering", faults, "halves of another model")


def _expected(
    tensor: GgufTensor, weights: Mapping[str, torch.Tensor], computed: Mapping[str, Any]
) -> torch.Tensor | None:
    if not tensor.source:
        value = computed.get(tensor.name)
        return None if value is None else torch.from_numpy(np.asarray(value, np.float32))
    weight = weights.get(tensor.source)
    if weight is None:
        return None
    kind, arguments = (tensor.transform.kind, tensor.transform.arguments) if tensor.transform else (None, ())
    made: torch.Tensor = values.apply(weight.detach(), kind, arguments)[tensor.output]
    return made


def value_fault(stored: StoredTensor, expected: torch.Tensor, limit: tuple[float, float]) -> str:
    """What is wrong with the values of a tensor, or ``""``; `limit` bounds the error of the tensor and of a block."""
    if expected.numel() != int(np.prod(stored.shape, dtype=np.int64)):
        return f"{list(stored.shape)} values where the weight has {list(expected.shape)}"
    matrix = expected.float().reshape(len(stored.data), -1)
    if stored.type in EXACT_TYPES:
        return _float_fault(stored, matrix)
    found = rounding_of(stored, matrix)
    if not found.relative <= limit[0]:
        return f"relative RMS error {found.relative:.3g} for {stored.type} (limit {limit[0]:g})"
    if not found.worst <= limit[1]:
        return f"relative RMS error {found.worst:.3g} in one block of {stored.type} (limit {limit[1]:g})"
    if found.disordered and stored.type not in _GRIDS:
        return f"{found.disordered} values are not in the order of the model's: rounded from other weights"
    return ""


def _float_fault(stored: StoredTensor, matrix: torch.Tensor) -> str:
    different, largest = 0, 0.0
    for rows, piece in stored.pieces():
        wanted = matrix[rows].to(_FLOAT_DTYPES[stored.type]).float().numpy()
        unequal = ~((piece == wanted) | (np.isnan(piece) & np.isnan(wanted)))
        if unequal.any():
            different += int(unequal.sum())
            largest = max(largest, float(np.abs(piece - wanted)[unequal].max()))
    if not different:
        return ""
    return f"{different} of {matrix.numel()} values are not the weight's {stored.type} (by up to {largest:.3g})"


def rounding_of(stored: StoredTensor, matrix: torch.Tensor) -> Rounding:
    """The rounding error of a tensor against the weight ``[rows, columns]``, float32, that it was made from."""
    block = max(ggml_type(stored.type).block, _SUB_BLOCK)
    found = Rounding()
    scale = float(matrix.double().square().mean()) if matrix.numel() else 0.0
    for rows, piece in stored.pieces():
        wanted = matrix[rows].numpy()
        error = (piece.astype(np.float64) - wanted).reshape(-1, block)
        errors = np.square(error).mean(axis=1)
        signals = np.square(wanted.astype(np.float64)).reshape(-1, block).mean(axis=1)
        found.error += float(errors.sum())
        found.signal += float(signals.sum())
        floor = max(_NEGLIGIBLE**2 * scale, _TINY)
        worst = float(np.sqrt(errors / np.maximum(signals, floor)).max())
        found.worst = worst if not worst <= found.worst else found.worst
        found.disordered += _disordered(wanted, piece)
    return found


def _disordered(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> int:
    groups, stored = wanted.reshape(-1, _SUB_BLOCK), found.reshape(-1, _SUB_BLOCK)
    order = np.argsort(groups, axis=1, kind="stable")
    ranked = np.take_along_axis(stored, order, axis=1)
    same = np.diff(np.take_along_axis(groups, order, axis=1), axis=1) == 0
    return int(((np.diff(ranked, axis=1) < 0) & ~same).sum())


def rebuilt_weights(pair: GgufPair, tensors: Sequence[GgufTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the PyTorch model as the files hold it: dequantized, and its transform undone; float32."""
    by_source: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        group = by_source.setdefault(tensor.source, [])
        if not group or group[0].file == tensor.file:  # the mmproj half may borrow a weight of the text's
            group.append(tensor)
    by_source.pop("", None)
    for source, group in by_source.items():
        ordered = sorted(group, key=lambda t: t.output)
        stored = [pair.of(t.file).tensors[t.name] for t in ordered]
        made = [torch.from_numpy(s.values()).reshape(t.shape) for s, t in zip(stored, ordered, strict=True)]
        transform = ordered[0].transform
        kind, arguments = (transform.kind, transform.arguments) if transform else (None, ())
        yield source, values.invert(made, kind, arguments)
