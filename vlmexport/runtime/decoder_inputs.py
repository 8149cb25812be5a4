"""What reaches a decoder for prompts: merged embeddings, and the further inputs that some families need beside them.

Further inputs by graph input: ``position_ids`` int64 ``[3, batch, tokens]`` (M-RoPE: time, height, width),
``deepstack_embeds`` float ``[layers, batch, tokens, hidden]`` (zeros off the images), ``block_ids`` int64 ``[batch,
tokens]`` (above 0: tokens of one number see each other) and ``per_layer_inputs`` float ``[batch, tokens, layers,
width]``, which follow from the ids alone: tokens of an answer have them as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.model.blocks import block_ids
from vlmexport.model.cross import STATES, TILE_MASK
from vlmexport.model.merge import MergeSpec
from vlmexport.model.per_token import PER_LAYER
from vlmexport.model.placing import joined_features
from vlmexport.model.positions import prompt_positions
from vlmexport.model.videos import as_pictures, has_tiles, pooled_features
from vlmexport.runtime.protocol import (
    BATCH_AXIS,
    DEFAULT_RESERVE,
    Array,
    Cache,
    ModelInputs,
    Runner,
    merge,
    pad_right,
)
from vlmexport.runtime.tiles import cross_inputs, stacked_states

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class DecoderInputs:
    """Embeddings ``[batch, tokens, hidden]`` and the further inputs that belong to the same tokens."""

    embeds: Array
    extras: Mapping[str, Array] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens, padding included."""
        return int(self.embeds.shape[1])

    def tokens(self, start: int, stop: int | None = None) -> DecoderInputs:
        """Tokens `start` to `stop` (None: the end) of every row."""
        return self._taken(np.arange(self.length)[start:stop])

    def followed(self, embeds: Array, given: Mapping[str, Array] | None = None) -> DecoderInputs:
        """The same prompt with the tokens `embeds` ``[1, tokens, hidden]`` of an answer behind it.

        `given` are further inputs of those; what is not in it is that of text.
        """
        count, extras, given = embeds.shape[1], {}, given or {}
        for name, array in self.extras.items():
            if name == STATES:
                extras[name] = array
                continue
            if name == TILE_MASK:
                extras[name] = np.concatenate([array, array[:, -1:].repeat(count, axis=1)], axis=1)
                continue
            if name in given:
                extras[name] = np.concatenate([array, given[name].astype(array.dtype)], axis=BATCH_AXIS[name] + 1)
                continue
            axis = BATCH_AXIS[name] + 1
            shape = [*array.shape[:axis], count, *array.shape[axis + 1 :]]
            more = np.zeros(shape, array.dtype)
            if name == "position_ids":
                more += array.max() + 1 + np.arange(count)
            extras[name] = np.concatenate([array, more], axis=axis)
        return DecoderInputs(np.concatenate([self.embeds, embeds.astype(self.embeds.dtype)], axis=1), extras)

    def mapped(self, change: Callable[[Array], Array]) -> DecoderInputs:
        """The same with `change` applied to everything that is not a whole number."""
        extras = {n: a if np.issubdtype(a.dtype, np.integer) else change(a) for n, a in self.extras.items()}
        return DecoderInputs(change(self.embeds), extras)

    def prefill(
        self, runner: Runner, attention_mask: Ids | None = None, keep: int = 1, *, reserve: int = DEFAULT_RESERVE
    ) -> tuple[Array, Cache]:
        """`Runner.prefill` of everything; without a mask no token is padding."""
        mask = np.ones(self.embeds.shape[:2], np.int64) if attention_mask is None else attention_mask
        return runner.prefill(self.embeds, mask, keep, reserve=reserve, extras=self.extras)

    def decode(self, runner: Runner, cache: Cache, keep: int = 1) -> Array:
        """`Runner.decode` of everything."""
        return runner.decode(self.embeds, cache, keep, extras=self.extras)

    def _taken(self, indices: NDArray[np.intp]) -> DecoderInputs:
        extras = {n: a if n == STATES else np.take(a, indices, axis=BATCH_AXIS[n] + 1) for n, a in self.extras.items()}
        return DecoderInputs(self.embeds[:, indices], extras)


def token_inputs(runner: Runner, ids: Ids) -> DecoderInputs:
    """What reaches the decoder of `runner` for tokens ``[batch, tokens]`` without image features in their places."""
    further = {PER_LAYER: runner.per_layer(ids)} if PER_LAYER in runner.merge_spec.extras else {}
    return DecoderInputs(runner.embed(ids), further)


def stacked(rows: Sequence[DecoderInputs], side: Literal["right", "left"] = "right") -> tuple[DecoderInputs, Ids]:
    """Single prompts as one batch, padded on `side`, and its mask ``[batch, longest]``.

    The padding repeats the row's own values: attention to it would change the result, zeros might hide it.
    """
    width = max(row.length for row in rows)
    mask = np.zeros((len(rows), width), np.int64)
    parts = []
    for index, row in enumerate(rows):
        before = 0 if side == "right" else width - row.length
        mask[index, before : before + row.length] = 1
        parts.append(row._taken((np.arange(width) - before) % row.length))
    if STATES in parts[0].extras:
        return DecoderInputs(np.concatenate([p.embeds for p in parts]), stacked_states([p.extras for p in parts])), mask
    extras = {n: np.concatenate([p.extras[n] for p in parts], axis=BATCH_AXIS[n]) for n in parts[0].extras}
    return DecoderInputs(np.concatenate([p.embeds for p in parts]), extras), mask


def merged_inputs(runner: Runner, batch: Sequence[ModelInputs]) -> tuple[DecoderInputs, Ids]:
    """What reaches the decoder of `runner` for a batch of prompts, and the right-padded mask.

    Images are encoded prompt by prompt: image counts and sizes may differ between the rows.
    """
    return with_features(runner, batch, encoded_pictures(runner, batch))


def encoded_pictures(runner: Runner, batch: Sequence[ModelInputs]) -> list[Array]:
    """The image features of each prompt that has pixels; videos as images of several frames, or as tiles."""
    return [_encoded(runner, item) for item in batch if item.pixel_inputs]


def _encoded(runner: Runner, item: ModelInputs) -> Array:
    spec = runner.merge_spec
    if not has_tiles(spec, item.pixel_inputs):
        return runner.image_features(as_pictures(spec, item.input_ids, item.pixel_inputs)[1])
    return pooled_features(
        spec,
        item.input_ids,
        item.pixel_inputs,
        runner.image_features,
        lambda tiles: runner.project(runner.vision(tiles)),
    )


def with_features(runner: Runner, batch: Sequence[ModelInputs], features: Sequence[Array]) -> tuple[DecoderInputs, Ids]:
    """`merged_inputs` of image features that are made already, for each prompt with images in order."""
    spec = runner.merge_spec
    rows = [as_pictures(spec, item.input_ids, item.pixel_inputs)[0] for item in batch]
    ids, mask = pad_right(rows, 0 if spec.image_token_id else 1)
    joined = joined_features(spec, features)
    tokens = token_inputs(runner, ids)
    further = further_inputs(spec, batch, tokens.embeds, ids, joined)
    if spec.place == "cross_attention":
        further |= cross_inputs(spec, batch, ids.shape[1], features, tokens.embeds)
    return DecoderInputs(merge(spec, tokens.embeds, ids, joined), {**tokens.extras, **further}), mask


def further_inputs(
    spec: MergeSpec, batch: Sequence[ModelInputs], embeds: Array, ids: Ids, features: Array | None
) -> dict[str, Array]:
    """The inputs that ``spec.extras`` names, for prompts `ids` ``[batch, tokens]`` that are padded on the right.

    But for ``per_layer_inputs``, which `token_inputs` has.
    """
    makers: dict[str, Callable[[], Array]] = {
        "position_ids": lambda: _positions(spec, batch, ids.shape[1]),
        "deepstack_embeds": lambda: _deepstack(spec, embeds, ids, features),
        "block_ids": lambda: block_ids(spec.mask, ids, spec.image_token_id, spec.block_tokens),
    }
    names = [name for name in spec.extras if name not in (PER_LAYER, TILE_MASK)]
    if unknown := [name for name in names if name not in makers]:
        raise BadInputError(f"the decoder needs {unknown[0]}, which this version cannot make")
    return {name: makers[name]() for name in names}


def _positions(spec: MergeSpec, batch: Sequence[ModelInputs], width: int) -> Ids:
    """int64 ``[3, batch, width]``, zero where a row is padded."""
    rows = [prompt_positions(spec, item.input_ids, item.pixel_inputs) for item in batch]
    return np.concatenate([np.pad(row, ((0, 0), (0, 0), (0, width - row.shape[2]))) for row in rows], axis=1)


def _deepstack(spec: MergeSpec, embeds: Array, ids: Ids, features: Array | None) -> Array:
    """``[layers, batch, tokens, hidden]``: what each early layer adds, zeros off the images."""
    hidden = embeds.shape[2]
    made = np.zeros((spec.deepstack_layers, *embeds.shape), embeds.dtype if features is None else features.dtype)
    if features is not None:
        rows = features[:, hidden:].reshape(len(features), spec.deepstack_layers, hidden)
        made[:, ids == spec.image_token_id] = rows.transpose(1, 0, 2)
    return made
