"""What decoders with cross-attention to image features take of a batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmexport.errors import BadInputError
from vlmexport.model.cross import HIDDEN, MISSING, STATES, TILE_MASK, tile_mask
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.protocol import Array, ModelInputs


def cross_inputs(
    spec: MergeSpec, batch: Sequence[ModelInputs], width: int, features: Sequence[Array], embeds: Array
) -> dict[str, Array]:
    """Features ``[batch, T, hidden]`` and masks ``[batch, width, tiles]`` of prompts that are padded on the right.

    `features` are those of the prompts with images, in order, ``[T, hidden]`` each. Prompts with fewer tiles than
    others have zeros, and `MISSING` in their masks; without any image in the batch there are no features.
    """
    supply = iter(features)
    rows = []
    for item in batch:
        if not item.pixel_inputs:
            empty = np.zeros((1, spec.tile_tokens, embeds.shape[-1]), embeds.dtype)
            mask = np.full((1, item.input_ids.shape[1], 1), MISSING, np.int64)
            rows.append({STATES: empty, TILE_MASK: _wide(mask, width)})
            continue
        if TILE_MASK not in item.pixel_inputs:
            raise BadInputError(f"a prompt with images needs its processor's {TILE_MASK}")
        states, mask = next(supply)[None], tile_mask(item.pixel_inputs[TILE_MASK])
        if states.shape[1] != mask.shape[2] * spec.tile_tokens:
            raise BadInputError(
                f"{states.shape[1]} feature rows for {mask.shape[2]} tiles of {spec.tile_tokens}: they do not fit"
            )
        rows.append({STATES: states, TILE_MASK: _wide(mask, width)})
    return stacked_states(rows)


def stacked_states(rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Features and masks of single prompts of one length as those of a batch."""
    tiles = max(row[TILE_MASK].shape[2] for row in rows)
    length = max(row[STATES].shape[1] for row in rows)
    states = [np.pad(row[STATES], ((0, 0), (0, length - row[STATES].shape[1]), (0, 0))) for row in rows]
    masks = []
    for row in rows:
        more = ((0, 0), (0, 0), (0, tiles - row[TILE_MASK].shape[2]))
        masks.append(np.pad(row[TILE_MASK], more, constant_values=MISSING))
    return {STATES: np.concatenate(states), TILE_MASK: np.concatenate(masks)}


def check_states(extras: Mapping[str, Array]) -> None:
    """Refuse features without the mask that says who sees them, or a mask of seen tiles without their features.

    A mask of `MISSING` alone needs no features: that is a prompt without pictures. Raises `BadInputError`.
    """
    mask = extras.get(TILE_MASK)
    if STATES in extras and mask is None:
        raise BadInputError(f"{STATES} came without {TILE_MASK}, which says what tokens see of them: give both")
    if STATES not in extras and mask is not None and bool((mask != MISSING).any()):
        raise BadInputError(
            f"{TILE_MASK} has {int((mask != MISSING).any(axis=1).sum())} tiles and {STATES} is not there: give both"
        )


def missing_tiles(batch: int, tokens: int, tiles: int) -> Array:
    """The mask of prompts without pictures, int64 ``[batch, tokens, tiles]``."""
    return np.full((batch, tokens, tiles), MISSING, np.int64)


def last_rows(mask: Array, attention_mask: Array) -> Array:
    """The row of each prompt's last token that is no padding, ``[batch, 1, tiles]``."""
    tokens = attention_mask.shape[1]
    last = tokens - 1 - np.argmax(attention_mask[:, ::-1] == 1, axis=1)
    return np.take_along_axis(mask, last[:, None, None], axis=1)


def _wide(mask: Array, width: int) -> Array:
    """`mask` ``[1, tokens, tiles]`` with rows of padding behind it: they see what the last token sees."""
    missing = width - mask.shape[1]
    if missing <= 0:
        return mask
    last = np.where(mask[:, -1:] == MISSING, MISSING, HIDDEN)
    return np.concatenate([mask, last.repeat(missing, axis=1)], axis=1)
