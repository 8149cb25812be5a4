"""`MergeSpec`: how image features enter the decoder, as data (the generic split fills it in)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlmexport.errors import ArtifactError
from vlmexport.model.anyres import AnyRes, Array
from vlmexport.model.blocks import MaskKind
from vlmexport.model.cross import STATE_MASK, STATES, cross_names
from vlmexport.model.pictures import EachPicture
from vlmexport.model.videos import VideoSpec


@dataclass(frozen=True)
class MergeSpec:
    """How the parts fit together around the decoder.

    `place`: ``scatter`` replaces the embedding rows of the image tokens, in order, by the feature rows; ``add`` adds
    them to those. `fixed_tokens`: in a prompt with images the embeddings of these tokens are replaced by fixed rows,
    the last ones of what the projector gives, one for each (`model/placing.py`).
    `position`: ``1d`` counts positions from `position_start`; ``mrope`` gives each token three (`model/positions.py`),
    for image tokens by their patch grid, of which `spatial_merge_size` x `spatial_merge_size` patches are one token.
    `mask`: ``causal`` for all tokens; with ``image_blocks`` and ``prefix`` blocks of tokens see each other, which the
    decoder gets as ``block_ids`` (`model/blocks.py`); with ``image_tokens`` those with ids of `block_tokens` are one.
    `packing`: how the projector's rows become feature rows; None where they are those. `pictures`: how what the vision
    encoder makes of single pictures is joined; None where it takes all at once.
    `extras`: further decoder inputs that the family needs, by graph input (none for plain scatter families).
    `deepstack_layers`: so many first decoder layers get features of their own added to their result at the image
    tokens; a feature row is then ``1 + deepstack_layers`` rows of the hidden size, the embedding's first.
    `decoder_start_token_id`: the embeddings are those of a text encoder, and the decoder starts with this token; None
    for decoders that get them themselves. `cross_layers` attend to states beside the tokens (`model/cross.py`). With
    `place` ``cross_attention`` these are the feature rows, `tile_tokens` of them for each tile of a picture.
    `video`: how videos enter (`model/videos.py`); None where they have no place.
    """

    image_token_id: int
    place: Literal["scatter", "add", "cross_attention"] = "scatter"
    position: Literal["1d", "mrope"] = "1d"
    position_start: int = 0
    mask: MaskKind = "causal"
    extras: tuple[str, ...] = ()
    packing: AnyRes | None = None
    pictures: EachPicture | None = None
    spatial_merge_size: int = 1
    deepstack_layers: int = 0
    fixed_tokens: tuple[int, ...] = ()
    block_tokens: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    cross_layers: tuple[int, ...] = ()
    tile_tokens: int = 0
    video: VideoSpec | None = None

    @property
    def crosses(self) -> bool:
        """Does the decoder attend to states beside its tokens, whose keys and values a part of its own makes?"""
        return bool(self.cross_layers)

    @property
    def encoder_inputs(self) -> tuple[str, ...]:
        """What that part takes."""
        return (STATES,) if self.place == "cross_attention" else ("inputs_embeds", "attention_mask")

    @property
    def cross_inputs(self) -> set[str]:
        """What it gives, and the decoder takes in every call."""
        return {name for layer in self.cross_layers for name in cross_names(layer)}

    @property
    def cross_masks(self) -> tuple[str, ...]:
        """The decoder's mask of such states, where it is the same in every call."""
        return (STATE_MASK,) if self.crosses and self.place != "cross_attention" else ()

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MergeSpec:
        """Read `to_dict`'s data back; raises `ArtifactError` on unknown keys."""
        known = {f.name for f in dataclasses.fields(MergeSpec)}
        if unknown := sorted(data.keys() - known):
            raise ArtifactError(f"merge specification has unknown keys {unknown}")
        packing, pictures, video = (data.get(name) for name in ("packing", "pictures", "video"))
        return MergeSpec(
            **{
                **data,
                "extras": tuple(data.get("extras", ())),
                "fixed_tokens": tuple(data.get("fixed_tokens", ())),
                "cross_layers": tuple(data.get("cross_layers", ())),
                "block_tokens": tuple(data.get("block_tokens", ())),
                "packing": None if packing is None else AnyRes.from_dict(packing),
                "pictures": None if pictures is None else EachPicture.from_dict(pictures),
                "video": None if video is None else VideoSpec(**video),
            }
        )

    def encode(
        self, pixel_inputs: Mapping[str, Array], encode: Callable[[Mapping[str, Array]], tuple[Array, ...]]
    ) -> Array | tuple[Array, ...]:
        """The vision features of what the processor made: one tensor, or several; `encode` runs the vision encoder."""
        if self.pictures is not None:
            return self.pictures.join([encode(picture)[0] for picture in self.pictures.pictures(pixel_inputs)])
        features = encode(pixel_inputs if self.packing is None else self.packing.tiles(pixel_inputs))
        return features[0] if len(features) == 1 else features

    def packed(self, rows: Array, pixel_inputs: Mapping[str, Array]) -> Array:
        """The projector's `rows` as they are merged."""
        return rows if self.packing is None else self.packing.pack(rows, pixel_inputs)
