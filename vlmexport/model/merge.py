"""`MergeSpec`: how image features enter the decoder, as data (the generic split fills it in)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vlmexport.errors import ArtifactError
from vlmexport.model.blocks import MaskKind


@dataclass(frozen=True)
class MergeSpec:
    """How the parts fit together around the decoder.

    `place`: ``scatter`` replaces the embedding rows of the image tokens, in order, by the feature rows.
    `position`: ``1d`` counts positions from `position_start`; ``mrope`` gives each token three (`model/positions.py`),
    for image tokens by their patch grid, of which `spatial_merge_size` x `spatial_merge_size` patches are one token.
    `mask`: ``causal`` for all tokens; with ``image_blocks`` and ``prefix`` blocks of tokens see each other, which the
    decoder gets as ``block_ids`` (`model/blocks.py`).
    `extras`: further decoder inputs that the family needs, by graph input (none for plain scatter families).
    `deepstack_layers`: so many first decoder layers get features of their own added to their result at the image
    tokens; a feature row is then ``1 + deepstack_layers`` rows of the hidden size, the embedding's first.
    """

    image_token_id: int
    place: Literal["scatter"] = "scatter"
    position: Literal["1d", "mrope"] = "1d"
    position_start: int = 0
    mask: MaskKind = "causal"
    extras: tuple[str, ...] = ()
    spatial_merge_size: int = 1
    deepstack_layers: int = 0

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
