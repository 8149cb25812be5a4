"""The one runner protocol: numpy in, numpy out, the same five steps for every runtime.

A prompt is answered by ``image_features`` (``vision`` then ``project``), ``embed``, `merge`, ``prefill`` and then
``decode`` once per token. Batches are padded on the right and decoded *ragged*: every row continues behind its own
last valid token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError, VlmExportError
from vlmexport.model.cross import TILE_MASK
from vlmexport.model.merge import MergeSpec
from vlmexport.model.per_token import PER_LAYER
from vlmexport.model.placing import place_features

Array = NDArray[Any]
# What a vision encoder hands to its projector: one tensor, or several in the order of the graph's outputs.
VisionFeatures: TypeAlias = Array | tuple[Array, ...]
# What a decoder takes beside embeddings and mask, by graph input: see `decoder_inputs`.
Extras: TypeAlias = Mapping[str, Array]
# The axis of each that is the batch; the next one is the tokens. Plain positions are [batch, tokens].
BATCH_AXIS = {"position_ids": 1, "deepstack_embeds": 1, "block_ids": 0, PER_LAYER: 0, TILE_MASK: 0}
DEFAULT_RESERVE = 64


class PartOutputError(VlmExportError):
    """A part of an export does not load, does not run, or gives missing, misshapen or non-finite values (exit code 3).

    `part` is the part's role, so that a gate can name it.
    """

    exit_code = 3

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(f"{part}: {problem}")
        self.part = part


@dataclass
class Cache:
    """The key-value cache of one running batch; made by ``prefill``, advanced in place by ``decode``.

    `lengths`: int64 ``[batch]``, the valid tokens of each row so far. `position_shift` int64 ``[batch]``: the position
    of a row's next token is its length and this (images take fewer positions than tokens under M-RoPE). `fixed`: what
    the decoder takes in every call, by graph input; `repeated` ``[batch, 1, ...]``: what every further token has. The
    rest belongs to the runner that made it.
    """

    lengths: NDArray[np.int64]
    position_shift: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64), kw_only=True)
    fixed: dict[str, Array] = field(default_factory=dict, kw_only=True)
    repeated: dict[str, Array] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class ModelInputs:
    """One prompt, ready for a runner.

    `input_ids`: int64 ``[1, tokens]`` without padding. `pixel_inputs`: what the image processor made, by name; empty
    for a prompt without images.
    """

    input_ids: NDArray[np.int64]
    pixel_inputs: dict[str, Array] = field(default_factory=dict)


class Runner(Protocol):
    """What every runtime offers. Floating outputs are float16 or float32 arrays; errors are `PartOutputError`."""

    @property
    def merge_spec(self) -> MergeSpec:
        """How image features enter the decoder."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""

    def vision(self, pixel_inputs: Mapping[str, Array]) -> VisionFeatures:
        """Vision features of all images of one prompt; names that the encoder does not know are left out."""

    def project(self, vision_features: VisionFeatures) -> Array:
        """Image features ``[image_tokens, width]``, rows in the order of the image tokens.

        `width` is the hidden size, or that times ``1 + deepstack_layers`` of the merge specification.
        """

    def image_features(self, pixel_inputs: Mapping[str, Array]) -> Array:
        """``project(vision(pixel_inputs))``, or the runtime's own whole path from pixels to image features."""

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        """Embeddings ``[batch, tokens, hidden]`` of ``input_ids`` ``[batch, tokens]``."""

    def per_layer(self, input_ids: NDArray[np.int64]) -> Array:
        """What the layers get of each token, ``[batch, tokens, layers, width]``; for families that need it.

        Those have ``per_layer_inputs`` in the extras of `merge_spec`. Raises `BadInputError` for others.
        """

    def prefill(
        self,
        inputs_embeds: Array,
        attention_mask: NDArray[np.int64],
        keep: int = 1,
        *,
        reserve: int = DEFAULT_RESERVE,
        extras: Extras | None = None,
    ) -> tuple[Array, Cache]:
        """Start a batch: logits float32 ``[batch, kept, vocab]`` and the cache.

        `attention_mask` ``[batch, tokens]`` has ones first, then zeros (right padding). `keep`: 0 = logits of all
        positions, n = of the last n valid positions of each row. `reserve`: tokens to make room for after the prompt
        (the cache grows when more come). `extras`: further inputs of the same tokens; what is not given is that of
        text. Raises `BadInputError` for one that the decoder does not take.

        Of an encoder-decoder the embeddings are those of its encoder: the logits are of each row's first answer token,
        ``[batch, 1, vocab]`` whatever `keep` is.
        """

    def decode(self, inputs_embeds: Array, cache: Cache, keep: int = 1, *, extras: Extras | None = None) -> Array:
        """Continue every row by ``inputs_embeds`` ``[batch, tokens, hidden]``; logits as in `prefill`.

        Advances `cache` in place by `tokens` for every row. More than one token at once only for a batch of one.
        `extras` as in `prefill`: without them positions go on behind the row's last one.
        """


def merge(spec: MergeSpec, inputs_embeds: Array, input_ids: NDArray[np.int64], image_features: Array | None) -> Array:
    """Put image features into their places; see `vlmexport.model.placing.place_features`."""
    return place_features(spec, inputs_embeds, input_ids, image_features)


def pad_right(rows: Sequence[NDArray[np.int64]], pad_id: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stack prompts ``[1, tokens]`` into ``input_ids`` and ``attention_mask``, both ``[batch, longest]``."""
    width = max(row.shape[1] for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : row.shape[1]] = row[0]
        mask[index, : row.shape[1]] = 1
    return ids, mask


def vision_feature_names(count: int) -> tuple[str, ...]:
    """Names of the `count` tensors that a vision encoder gives and its projector takes, in order."""
    return tuple("vision_features" if index == 0 else f"vision_features_{index}" for index in range(count))


def named_features(features: VisionFeatures) -> dict[str, Array]:
    """The tensors of `features` by the names that graphs give them."""
    tensors = features if isinstance(features, tuple) else (features,)
    return dict(zip(vision_feature_names(len(tensors)), tensors, strict=True))


def feature_outputs(outputs: Iterable[str]) -> tuple[str, ...]:
    """Those of a vision encoder's `outputs` that its projector takes, in order."""
    count = sum(name.startswith("vision_features") for name in outputs)
    return vision_feature_names(max(count, 1))


def token_axis(name: str, array: Array) -> int:
    """The axis of the further input `name` that counts tokens."""
    return 1 if name == "position_ids" and array.ndim == 2 else BATCH_AXIS[name] + 1


def next_shift(positions: NDArray[np.int64], mask: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`Cache.position_shift` ``[batch]`` behind tokens at `positions` ``[..., batch, tokens]``, valid where `mask` is.

    `lengths` ``[batch]`` are the valid tokens of each row, these included.
    """
    largest = np.where(mask == 1, positions, -1).max(axis=-1)
    shift: NDArray[np.int64] = (largest if largest.ndim == 1 else largest.max(axis=0)) + 1 - lengths
    return shift


def no_per_layer(runner: str) -> BadInputError:
    """The error of a `runner` whose model has no inputs for each layer."""
    return BadInputError(f"{runner} has no {PER_LAYER}: the model takes none, or its runtime gives none")


def require_no_extras(extras: Extras | None, runner: str) -> None:
    """Raise `BadInputError` when there are further inputs, which `runner` cannot feed."""
    if extras:
        raise BadInputError(f"{runner} takes no {', '.join(sorted(extras))}")


def require_right_padding(attention_mask: NDArray[np.int64]) -> None:
    """Raise `BadInputError` unless every row of the mask is ones first, then zeros, and starts with a one."""
    good = (np.diff(attention_mask, axis=1) <= 0).all(axis=1) & (attention_mask[:, 0] == 1)
    if not good.all():
        row = int(np.argmin(good))
        raise BadInputError(f"row {row} of the attention mask is not right-padded: {attention_mask[row].tolist()}")
