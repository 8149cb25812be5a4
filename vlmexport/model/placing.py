"""Where feature rows go in a prompt's embeddings: the rule of `MergeSpec`, in numpy, which the split proves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from vlmexport.model.merge import MergeSpec

Array = NDArray[np.generic]
Ids = NDArray[np.int64]


def joined_features(spec: MergeSpec, features: Sequence[Array]) -> Array | None:
    """The feature rows of several prompts as those of one; None for no prompt with images.

    The rows of ``spec.fixed_tokens`` end every prompt's; all prompts' are the same, so the last are kept.
    """
    if not features:
        return None
    fixed = len(spec.fixed_tokens)
    if not fixed:
        return np.concatenate(list(features))
    return np.concatenate([*(rows[:-fixed] for rows in features), features[-1][-fixed:]])


def place_features(spec: MergeSpec, inputs_embeds: Array, input_ids: Ids, image_features: Array | None) -> Array:
    """Embeddings ``[batch, tokens, hidden]`` with the feature rows in their places; other rows are unchanged.

    The result has the wider of the two dtypes; of a feature row, its first ``hidden`` values. Raises `BadInputError`
    when the numbers of image tokens and of feature rows differ, or their width is wrong, naming both.
    """
    if spec.place == "cross_attention":
        return inputs_embeds
    places, fixed = input_ids == spec.image_token_id, len(spec.fixed_tokens)
    tokens, rows = int(places.sum()), 0 if image_features is None else len(image_features) - fixed
    if tokens != rows:
        raise BadInputError(f"the prompt has {tokens} image tokens (id {spec.image_token_id}) but {rows} feature rows")
    if image_features is None or not rows:
        return inputs_embeds
    hidden = inputs_embeds.shape[2]
    if image_features.shape[1] != hidden * (1 + spec.deepstack_layers):
        raise BadInputError(
            f"a feature row has {image_features.shape[1]} values, not {1 + spec.deepstack_layers} times {hidden}"
        )
    merged = inputs_embeds.astype(np.result_type(inputs_embeds.dtype, image_features.dtype))
    new = image_features[:rows, :hidden]
    merged[places] = merged[places] + new if spec.place == "add" else new
    with_images = places.any(axis=1, keepdims=True)
    for token, row in zip(spec.fixed_tokens, image_features[rows:, :hidden], strict=True):
        merged[(input_ids == token) & with_images] = row
    return merged
