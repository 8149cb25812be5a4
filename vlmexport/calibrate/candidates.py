"""The ways of storing a weight that ``--quant auto`` chooses among, with the bytes each takes in the export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme

if TYPE_CHECKING:
    from vlmexport.plan import WeightPlan

# What an export would do under a scheme and with these weights kept: `plan_export` or `plan_checkpoint`, bound.
Planner = Callable[[QuantScheme, tuple[str, ...]], tuple["WeightPlan", ...]]
SMALL, LARGE = 4, 8
# Smaller groups are the other way to spend bytes: a scale for 16 weights costs as much as one or two bits each.
_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Candidate:
    """One way of storing a weight: `scheme` (None: unquantized), and the bytes of each weight that can be stored so."""

    scheme: QuantScheme | None
    sizes: Mapping[str, int]

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """`scheme` by weight; empty when it is not quantized."""
        return {} if self.scheme is None else dict.fromkeys(self.sizes, self.scheme)

    @property
    def label(self) -> str:
        """For people and files: ``4 bits g32``, ``4 bits per row`` or ``unquantized``."""
        if self.scheme is None:
            return "unquantized"
        group = self.scheme.group_size
        return f"{self.scheme.bits} bits " + ("per row" if group == PER_CHANNEL else f"g{group}")


@dataclass(frozen=True)
class Candidates:
    """All candidates, the base scheme's own first; `fixed` are the bytes of the weights that are never quantized."""

    every: tuple[Candidate, ...]
    fixed: int

    @property
    def names(self) -> list[str]:
        """The weights that there is a choice for."""
        return list(self.every[0].sizes)

    @property
    def smallest(self) -> int:
        """Bytes of all weights with each at its smallest."""
        return self.fixed + sum(min(c.sizes[n] for c in self.every if n in c.sizes) for n in self.names)

    def uniform(self) -> dict[int, int]:
        """Bytes of all weights of the export under each quantizing candidate that every weight can take, by index."""
        return {
            i: self.fixed + sum(c.sizes.values())
            for i, c in enumerate(self.every)
            if c.scheme is not None and len(c.sizes) == len(self.names)
        }


def find_candidates(planner: Planner, base: QuantScheme) -> Candidates:
    """What `planner`'s export can do with the weights that it quantizes under `base` (which has no overrides).

    4 bits in groups of 16 to 128, 8 bits in the base's groups and the largest, and unquantized, as far as the base's
    algorithm takes them and the groups divide a weight's input features. Raises `BadInputError` when nothing is to be
    quantized, and as `planner` does.
    """
    small = planner(base, ())
    widths = {w.name: w.shape[-1] for w in small if w.scheme is not None}
    if not widths:
        raise BadInputError("--quant auto: no weight of this model is to be quantized")
    found = [Candidate(base, {w.name: w.bytes_after for w in small if w.name in widths})]
    for scheme in _schemes(base):
        fit = [n for n, k in widths.items() if scheme.group_size == PER_CHANNEL or k % scheme.group_size == 0]
        mixed = dataclasses.replace(base, overrides=dict.fromkeys(fit, scheme))
        sizes = {w.name: w.bytes_after for w in planner(mixed, ())}
        if fit:
            found.append(Candidate(scheme, {name: sizes[name] for name in fit}))
    kept = {w.name: w.bytes_after for w in planner(base, tuple(widths))}
    found.append(Candidate(None, {name: kept[name] for name in widths}))
    return Candidates(tuple(found), sum(w.bytes_after for w in small if w.name not in widths))


def _schemes(base: QuantScheme) -> list[QuantScheme]:
    """The other schemes of `base`'s algorithm."""
    method = algorithm(base.algorithm)
    wanted = [(SMALL, g) for g in _GROUPS] + [(LARGE, base.group_size), (LARGE, _GROUPS[-1])]
    return [
        dataclasses.replace(base, bits=bits, group_size=group)
        for bits, group in dict.fromkeys(wanted)
        if bits in method.bits
        and (method.group_sizes is None or group in method.group_sizes)
        and (bits, group) != (base.bits, base.group_size)
    ]
