"""Pictures that stand for nothing: the padding that image processors add."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlmexport.runtime.protocol import Array

_PIXELS = "pixel_values"
_BY_PICTURE = (_PIXELS, "pixel_attention_mask")
_DIMS_BY_PROMPT = 5  # [prompts, pictures, channels, height, width]


def without_padding_pictures(pixel_inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The pixel inputs of one prompt without pictures whose pixels are all zero, nor their attention masks.

    Processors that count pictures by prompt (``pixel_values`` ``[1, pictures, channels, height, width]``: Idefics and
    SmolVLM) pad prompts that have fewer with such pictures, and the models leave them out again; the first stays where
    there is no other. Inputs of any other form, one row for each picture or tile, have no such padding.
    """
    pixels = pixel_inputs.get(_PIXELS)
    if pixels is None or pixels.ndim != _DIMS_BY_PROMPT or pixels.shape[0] != 1:
        return dict(pixel_inputs)
    counts = pixels[0].reshape(pixels.shape[1], -1).any(axis=1)
    counts[0] |= not counts.any()
    if counts.all():
        return dict(pixel_inputs)
    kept = np.flatnonzero(counts)
    return {name: array[:, kept] if name in _BY_PICTURE else array for name, array in pixel_inputs.items()}
