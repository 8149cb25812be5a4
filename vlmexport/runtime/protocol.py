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
from vlmexport.model.merge import MergeSpec

Array = NDArray[Any]
# What a vision encoder hands to its projector: one tensor, or several in the order of the graph's outputs.
VisionFeatures: TypeAlias = Array | tuple[Array, ...]
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

    `lengths`: int64 ``[batch]``, the valid tokens of each row so far. The rest belongs to the runner that made it.
    """

    lengths: NDArray[np.int64]


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
        """Image features ``[image_tokens, hidden]``, rows in the order of the image tokens."""

    def image_features(self, pixel_inputs: Mapping[str, Array]) -> Array:
        """``project(vision(pixel_inputs))``, or the runtime's own whole path from pixels to image features."""

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        """Embeddings ``[batch, tokens, hidden]`` of ``input_ids`` ``[batch, tokens]``."""

    def prefill(
        self, inputs_embeds: Array, attention_mask: NDArray[np.int64], keep: int = 1, *, reserve: int = DEFAULT_RESERVE
    ) -> tuple[Array, Cache]:
        """Start a batch: logits float32 ``[batch, kept, vocab]`` and the cache.

        `attention_mask` ``[batch, tokens]`` has ones first, then zeros (right padding). `keep`: 0 = logits of all
        positions, n = of the last n valid positions of each row. `reserve`: tokens to make room for after the prompt
        (the cache grows when more come).
        """

    def decode(self, inputs_embeds: Array, cache: Cache, keep: int = 1) -> Array:
        """Continue every row by ``inputs_embeds`` ``[batch, tokens, hidden]``; logits as in `prefill`.

        Advances `cache` in place by `tokens` for every row. More than one token at once only for a batch of one.
        """


def merge(spec: MergeSpec, inputs_embeds: Array, input_ids: NDArray[np.int64], image_features: Array | None) -> Array:
    """Put image features into the rows of the image tokens, in order; other rows are unchanged.

    The result has the wider of the two dtypes. Raises `BadInputError` when the numbers of image tokens and of feature
    rows differ, naming both.
    """
    places = input_ids == spec.image_token_id
    tokens, rows = int(places.sum()), 0 if image_features is None else len(image_features)
    if tokens != rows:
        raise BadInputError(f"the prompt has {tokens} image tokens (id {spec.image_token_id}) but {rows} feature rows")
    if image_features is None or not rows:
        return inputs_embeds
    merged = inputs_embeds.astype(np.result_type(inputs_embeds.dtype, image_features.dtype))
    merged[places] = image_features
    return merged


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


def prompt_embeds(runner: Runner, batch: Sequence[ModelInputs]) -> tuple[Array, NDArray[np.int64]]:
    """Merged embeddings ``[batch, longest, hidden]`` and the right-padded mask of a batch of prompts.

    Images are encoded prompt by prompt: image counts and sizes may differ between the rows.
    """
    pad_id = 0 if runner.merge_spec.image_token_id else 1
    ids, mask = pad_right([item.input_ids for item in batch], pad_id)
    features = [runner.image_features(item.pixel_inputs) for item in batch if item.pixel_inputs]
    joined = np.concatenate(features) if features else None
    return merge(runner.merge_spec, runner.embed(ids), ids, joined), mask


def require_right_padding(attention_mask: NDArray[np.int64]) -> None:
    """Raise `BadInputError` unless every row of the mask is ones first, then zeros, and starts with a one."""
    good = (np.diff(attention_mask, axis=1) <= 0).all(axis=1) & (attention_mask[:, 0] == 1)
    if not good.all():
        row = int(np.argmin(good))
        raise BadInputError(f"row {row} of the attention mask is not right-padded: {attention_mask[row].tolist()}")
