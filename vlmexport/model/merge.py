"""`MergeSpec`: how image features enter the decoder, as data (the generic split fills it in)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vlmexport.errors import ArtifactError


@dataclass(frozen=True)
class MergeSpec:
    """How the parts fit together around the decoder.

    `place`: ``scatter`` replaces the embedding rows of the image tokens, in order, by the feature rows.
    `position`: ``1d`` counts positions from `position_start`; `mask`: ``causal`` for all tokens.
    `extras`: further decoder inputs that the family needs (none for plain scatter families).
    """

    image_token_id: int
    place: Literal["scatter"] = "scatter"
    position: Literal["1d"] = "1d"
    position_start: int = 0
    mask: Literal["causal"] = "causal"
    extras: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MergeSpec:
        """Read `to_dict`'s data back; raises `ArtifactError` on unknown keys."""
        known = {f.name for f in dataclasses.fields(MergeSpec)}
        if unknown := sorted(data.keys() - known):
            raise ArtifactError(f"merge specification has unknown keys {unknown}")
        return MergeSpec(**{**data, "extras": tuple(data.get("extras", ()))})
