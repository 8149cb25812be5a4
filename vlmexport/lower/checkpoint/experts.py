"""Experts that are stored one by one and packed while they are loaded: which rows of which parameter a tensor is.

transformers' conversion rules say which packed parameter a tensor of the files goes to; where in it, its own numbers
say: it must be found there exactly once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.plan import layer_pattern
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import DecoderWeights

if TYPE_CHECKING:
    from torch import nn

_PACKED_AXES = 3
# A block of rows is looked up by its first row's hash, so that a tensor is not compared with every expert.
_Index = dict[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class Place:
    """What a tensor of the files is in the model: a whole `weight`, or rows of one expert of a packed one."""

    weight: str
    expert: int | None = None
    start: int = 0
    stop: int | None = None

    @property
    def label(self) -> str:
        """The matrix's name among a decoder's weights."""
        return self.weight if self.expert is None else f"{self.weight}.{self.expert}"

    def codes(self, weights: DecoderWeights) -> QuantizedTensor:
        """Its codes."""
        made = weights.quantized(self.label)
        return made if self.stop is None else made.rows(self.start, self.stop)

    def tensor(self, weights: DecoderWeights) -> torch.Tensor:
        """Its floats, folds applied."""
        made = weights.tensor(self.label)
        return made if self.stop is None else made[self.start : self.stop]


class ExpertFinder:
    """Finds tensors of the files in the packed parameters of a loaded `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._packed = {n: p.detach() for n, p in model.named_parameters() if p.ndim == _PACKED_AXES}
        self._indices: dict[tuple[str, int], _Index] = {}

    def find(self, parameter: str, tensor: torch.Tensor) -> Place | None:
        """Where ``tensor [R, K]`` is in `parameter`; None when it is nowhere, or at several places alike."""
        packed = self._packed.get(parameter)
        rows = tensor.shape[0] if tensor.ndim else 0
        if packed is None or tensor.ndim != _PACKED_AXES - 1 or not rows:
            return None
        if tensor.shape[1] != packed.shape[2] or packed.shape[1] % rows:
            return None
        wanted = tensor.to(packed.dtype)
        places = self._index(parameter, rows).get(_hash(wanted[0]), [])
        found = [(e, start) for e, start in places if torch.equal(packed[e, start : start + rows], wanted)]
        if len(found) != 1:
            return None
        expert, start = found[0]
        return Place(parameter, expert, start, start + rows)

    def _index(self, parameter: str, rows: int) -> _Index:
        """Every block of `rows` rows by its first row's hash."""
        if (parameter, rows) not in self._indices:
            packed = self._packed[parameter]
            index: _Index = {}
            for expert in range(packed.shape[0]):
                for start in range(0, packed.shape[1], rows):
                    index.setdefault(_hash(packed[expert, start]), []).append((expert, start))
            self._indices[parameter, rows] = index
        return self._indices[parameter, rows]


def _hash(row: torch.Tensor) -> int:
    return hash(row.contiguous().view(torch.uint8).numpy().tobytes())


def find_rows(
    model: nn.Module, targets: Mapping[str, str], tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, Place]:
    """The rows that each of `tensors` is, by its name in the files; `targets` says which parameter it goes to."""
    finder = ExpertFinder(model)
    found = ((key, finder.find(targets[key], tensor)) for key, tensor in tensors if key in targets)
    return {key: rows for key, rows in found if rows is not None}


def check_covered(model: nn.Module, packed: Iterable[str], places: Iterable[Place]) -> None:
    """Raise `UnsupportedModelError` for a parameter of `packed` of which not every row is in the files exactly once."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found: dict[str, list[tuple[int, int, int]]] = {}
    for place in places:
        if place.expert is not None and place.stop is not None:
            found.setdefault(place.weight, []).append((place.expert, place.start, place.stop))
    for name in packed:
        experts, height, _ = shapes[name]
        ends = [(0, 0), *((e * height + start, e * height + stop) for e, start, stop in sorted(found.get(name, [])))]
        gapless = all(before[1] == after[0] for before, after in itertools.pairwise(ends))
        if not gapless or ends[-1][1] != experts * height:
            raise UnsupportedModelError(
                f"the {experts} experts of {name} are not in the model's files one by one with numbers of their own, "
                "so their codes have no names that a loader would know; leave them alone with "
                f"--keep '{layer_pattern(name).rpartition('.')[0]}.*'"
            )
