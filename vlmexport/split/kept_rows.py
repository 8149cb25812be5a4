"""Towers that take pictures padded to a number of patches, and drop the padding behind their projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Places of patches that are padding.
_NOWHERE = -1
_PLACE_AXES = 3  # [pictures, patches, (x, y)]


@dataclass(frozen=True)
class KeptRows:
    """Of what is made of all patches, the rows that are a picture's: those whose places, input `name`, are not -1."""

    name: str

    def rows(self, tensor: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of `tensor` ``[pictures, patches, width]`` the kept rows ``[rows, width]``."""
        return tensor[(inputs[self.name] != _NOWHERE).all(dim=-1)]


def find_kept_rows(
    examples: Sequence[Mapping[str, torch.Tensor]], made: Sequence[torch.Tensor], features: Sequence[torch.Tensor]
) -> KeptRows | None:
    """Which input says the rows of `made` ``[pictures, patches, hidden]`` that are `features` ``[rows, hidden]``.

    None where all are, in every example, or no input says it.
    """
    if all(len(rows) == tensor.numel() // tensor.shape[-1] for rows, tensor in zip(features, made, strict=True)):
        return None
    for name, places in examples[0].items():
        if places.is_floating_point() or places.ndim != _PLACE_AXES or places.shape[:2] != made[0].shape[:-1]:
            continue
        kept = KeptRows(name)
        given = zip(examples, made, features, strict=True)
        if all(torch.equal(kept.rows(tensor, example), rows) for example, tensor, rows in given):
            return kept
    return None
