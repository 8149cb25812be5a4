"""Towers that see one picture at a time: the host cuts it out of its padding, and joins what came of all pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError

Array = NDArray[Any]
PIXELS, SIZES = "pixel_values", "image_sizes"


@dataclass(frozen=True)
class EachPicture:
    """The tower takes ``pixel_values`` ``[1, channels, height, width]``; features are joined along `axis`."""

    axis: int

    def pictures(self, pixel_inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """The tower's inputs, one for each picture, without the padding beyond its ``image_sizes`` (height, width)."""
        pixels, sizes = pixel_inputs[PIXELS], pixel_inputs[SIZES].tolist()
        if len(pixels) != len(sizes):
            raise BadInputError(f"{PIXELS} holds {len(pixels)} pictures, {SIZES} {len(sizes)}")
        return [{PIXELS: pixels[i : i + 1, :, :h, :w]} for i, (h, w) in enumerate(sizes)]

    def join(self, features: Sequence[Array]) -> Array:
        """The features of all pictures as the projector takes them."""
        return np.concatenate(features, axis=self.axis)
