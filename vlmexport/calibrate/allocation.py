"""Which weights get more bytes: all the ways worth considering, as pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The most allocations that are followed at once; with more, nearly equal sizes are merged.
_POINTS = 4096


@dataclass(frozen=True)
class Choice:
    """One way of storing a unit: `candidate` says which, with its size in bytes and the divergence it alone causes."""

    candidate: int
    size: int
    kl: float


@dataclass(frozen=True)
class Allocation:
    """A candidate for every unit, by the unit's name, with the sums of their sizes and divergences."""

    size: int
    kl: float
    candidates: Mapping[str, int]


def frontier(choices: Mapping[str, Sequence[Choice]]) -> list[Allocation]:
    """The allocations that no other one beats in both size and divergence, smallest first.

    The multiple-choice knapsack by dynamic programming over the Pareto set: exact for up to `_POINTS` distinct sizes;
    beyond that it keeps the best allocation of each of so many ranges of size (and the smallest of all). Raises
    ValueError for a unit without a choice.
    """
    sizes, kls = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for unit, found in choices.items():
        if not found:
            raise ValueError(f"{unit} has no choice")
        wide = (sizes[:, None] + np.array([c.size for c in found], np.int64)).ravel()
        losses = (kls[:, None] + np.array([c.kl for c in found])).ravel()
        kept = _thinned(_undominated(wide, losses), wide)
        history.append((kept // len(found), kept % len(found)))
        sizes, kls = wide[kept], losses[kept]
    return _followed(choices, history, sizes, kls)


def _undominated(sizes: npt.NDArray[np.int64], kls: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Indices of the points below all smaller ones, in the order of size."""
    order = np.lexsort((kls, sizes))
    ordered = kls[order]
    before = np.minimum.accumulate(np.concatenate(([np.inf], ordered[:-1])))
    undominated: npt.NDArray[np.int64] = order[ordered < before]
    return undominated


def _thinned(kept: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """At most about `_POINTS` of `kept`: the best of each range of size, which is the largest there."""
    if len(kept) <= _POINTS:
        return kept
    there = sizes[kept]
    span = int(there[-1] - there[0]) + 1
    bucket = (there - there[0]) * _POINTS // span
    last = np.append(bucket[1:] != bucket[:-1], True)
    last[0] = True
    thinned: npt.NDArray[np.int64] = kept[last]
    return thinned


def _followed(
    choices: Mapping[str, Sequence[Choice]],
    history: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    sizes: npt.NDArray[np.int64],
    kls: npt.NDArray[np.float64],
) -> list[Allocation]:
    """The points with what they were made of, followed back unit by unit."""
    at = np.arange(len(sizes))
    picked: dict[str, npt.NDArray[np.int64]] = {}
    for unit, (parent, choice) in zip(reversed(list(choices)), reversed(history), strict=True):
        candidates = np.array([c.candidate for c in choices[unit]], np.int64)
        picked[unit] = candidates[choice[at]]
        at = parent[at]
    return [
        Allocation(int(size), float(kl), {unit: int(picked[unit][i]) for unit in choices})
        for i, (size, kl) in enumerate(zip(sizes, kls, strict=True))
    ]
