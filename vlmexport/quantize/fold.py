"""`Fold`: scales moved between a weight and what comes before or after it, without changing the function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_END = "|"  # between a weight's name and what of its fold a tensor holds


@dataclass(frozen=True)
class Fold:
    """A weight ``w`` becomes ``(w + offset) * rows[:, None] * columns - offset``.

    `rows` and `columns` are float32 factors of the output and input features (None: ones); for a norm's weight or a
    bias, which have one axis, only `rows` is used. For packed experts ``[E, N, K]`` (biases ``[E, N]``) `rows` is
    ``[E, N]`` and `columns` ``[K]``, the same for all experts, or ``[E, K]``. `offset` is 1.0 for norms that multiply
    by ``1 + w``. AWQ's scales `s` (arXiv 2306.00978) are ``columns = s`` of every linear that reads the scaled input,
    and ``rows = 1 / s`` of what makes it.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    offset: float = 0.0

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The folded weight, float32, of `weight`'s shape (``[N, K]``, ``[N]``, ``[E, N, K]`` or ``[E, N]``)."""
        out = weight.float() + self.offset
        if self.rows is not None:
            out = out * (self.rows if weight.ndim == self.rows.ndim else self.rows[..., None])
        if self.columns is not None:
            out = out * self.columns.unsqueeze(-2)
        return out - self.offset

    def of_expert(self, expert: int) -> Fold:
        """The fold of one expert ``[N, K]`` of a packed parameter that this is the fold of."""
        columns = self.columns if self.columns is None or self.columns.ndim == 1 else self.columns[expert]
        return Fold(None if self.rows is None else self.rows[expert], columns, self.offset)

    def then(self, later: Fold) -> Fold:
        """This fold, then `later` (of the same offset)."""
        return Fold(_product(self.rows, later.rows), _product(self.columns, later.columns), self.offset)


def _product(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other


def folds_to_tensors(folds: Mapping[str, Fold]) -> dict[str, torch.Tensor]:
    """The folds of weights by name as float32 tensors to be stored: ``<weight>|rows``, ``|columns``, ``|offset``."""
    found: dict[str, torch.Tensor] = {}
    for name, fold in folds.items():
        parts = {"rows": fold.rows, "columns": fold.columns, "offset": torch.tensor(fold.offset)}
        found |= {f"{name}{_END}{key}": part.float().contiguous() for key, part in parts.items() if part is not None}
    return found


def folds_from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Fold]:
    """Read `folds_to_tensors`'s tensors back; raises KeyError where a weight's offset is missing."""
    names = dict.fromkeys(name.rpartition(_END)[0] for name in tensors)
    return {
        name: Fold(
            tensors.get(f"{name}{_END}rows"),
            tensors.get(f"{name}{_END}columns"),
            float(tensors[f"{name}{_END}offset"]),
        )
        for name in names
    }
