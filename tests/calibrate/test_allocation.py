"""The frontier of allocations, against every combination there is."""

from __future__ import annotations

import itertools
import random

import pytest

from vlmexport.calibrate import allocation
from vlmexport.calibrate.allocation import Allocation, Choice, frontier


def by_brute_force(choices: dict[str, list[Choice]]) -> list[tuple[int, float]]:
    """Size and divergence of every combination that no other beats."""
    every = sorted((sum(c.size for c in p), sum(c.kl for c in p)) for p in itertools.product(*choices.values()))
    best: list[tuple[int, float]] = []
    for size, kl in every:
        if not best or kl < best[-1][1]:
            best.append((size, kl))
    return best


def drawn(seed: int, units: int = 6) -> dict[str, list[Choice]]:
    """Units of some sizes, with candidates of which not all make sense; divergences are exact in binary."""
    draw = random.Random(seed)
    found = {}
    for u in range(units):
        sizes = sorted(draw.sample(range(1, 400), 4))
        kls = sorted((draw.randrange(1 << 16) / (1 << 20) for _ in sizes), reverse=True)
        kls[1], kls[2] = (kls[2], kls[1]) if u % 3 == 0 else (kls[1], kls[2])
        found[f"unit{u}"] = [Choice(i, size, kl) for i, (size, kl) in enumerate(zip(sizes, kls, strict=True))]
    return found


def sums(choices: dict[str, list[Choice]], found: Allocation) -> tuple[int, float]:
    picked = [next(c for c in choices[unit] if c.candidate == i) for unit, i in found.candidates.items()]
    return sum(c.size for c in picked), sum(c.kl for c in picked)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_brute_force_finds(seed: int) -> None:
    choices = drawn(seed)
    found = frontier(choices)
    assert [(a.size, a.kl) for a in found] == by_brute_force(choices)
    assert all(sums(choices, a) == (a.size, a.kl) for a in found)
    assert all(a.candidates.keys() == choices.keys() for a in found)


def test_more_points_than_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = drawn(1)
    exact = by_brute_force(choices)
    monkeypatch.setattr(allocation, "_POINTS", 16)
    found = frontier(choices)
    assert len(found) <= 17 < len(exact)
    assert found[0].size == exact[0][0]
    assert found[-1].kl == exact[-1][1]
    assert all(sums(choices, a) == (a.size, a.kl) for a in found)


def test_what_helps_most_for_its_bytes_comes_first() -> None:
    mild = [Choice(0, 4, 1.0), Choice(1, 8, 0.25)]
    bad = [Choice(0, 4, 9.0), Choice(1, 8, 0.5)]
    large = [Choice(0, 400, 9.0), Choice(1, 800, 0.5)]
    found = frontier({"mild": mild, "bad": bad, "large": large})
    assert [a.candidates for a in found[:3]] == [
        {"mild": 0, "bad": 0, "large": 0},
        {"mild": 0, "bad": 1, "large": 0},
        {"mild": 1, "bad": 1, "large": 0},
    ]


def test_a_unit_without_a_choice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="lonely has no choice"):
        frontier({"lonely": []})
