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
GRIDS, PATCH_MASK = "spatial_shapes", "pixel_attention_mask"
FRAMED = "image_grid_thw"


@dataclass(frozen=True)
class EachPicture:
    """The tower takes ``pixel_values`` ``[1, channels, height, width]``; features are joined along `axis`.

    `patches`: the processor gives rows of patches ``[pictures, patches, values]`` with their ``spatial_shapes`` (rows,
    columns), or the patches of all ``[patches, values]`` with ``image_grid_thw`` (1, rows, columns); the tower takes
    those of one as ``[1, values, rows, columns]``, in their order. Features are joined as rows ``[rows, width]``.
    """

    axis: int
    patches: bool = False

    def pictures(self, pixel_inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """The tower's inputs, one for each picture, without the padding beyond its size or its grid."""
        if self.patches and FRAMED in pixel_inputs:
            return _framed(pixel_inputs[PIXELS], pixel_inputs[FRAMED].tolist())
        named = GRIDS if self.patches else SIZES
        pixels, sizes = pixel_inputs[PIXELS], pixel_inputs[named].tolist()
        if len(pixels) != len(sizes):
            raise BadInputError(f"{PIXELS} holds {len(pixels)} pictures, {named} {len(sizes)}")
        if self.patches:
            return [{PIXELS: _grid(pixels[i], h, w)} for i, (h, w) in enumerate(sizes)]
        return [{PIXELS: pixels[i : i + 1, :, :h, :w]} for i, (h, w) in enumerate(sizes)]

    def join(self, features: Sequence[Array]) -> Array:
        """The features of all pictures as the projector takes them."""
        if self.patches:
            features = [array.reshape(-1, array.shape[-1]) for array in features]
        return np.concatenate(features, axis=self.axis)


def _grid(patches: Array, rows: int, columns: int) -> Array:
    """``[1, values, rows, columns]`` of patches ``[rows * columns or more, values]``."""
    if rows * columns > len(patches):
        raise BadInputError(f"{GRIDS} has a picture of {rows} x {columns} patches, {PIXELS} {len(patches)} of each")
    return patches[: rows * columns].T.reshape(1, -1, rows, columns)


def _framed(pixels: Array, sizes: list[list[int]]) -> list[dict[str, Array]]:
    """The pictures among the patches ``[patches, values]`` of all."""
    total = sum(frames * rows * columns for frames, rows, columns in sizes)
    if total != len(pixels) or any(frames != 1 for frames, _, _ in sizes):
        raise BadInputError(f"{PIXELS} holds {len(pixels)} patches, {FRAMED} {sizes}; expected as many, in one frame")
    ends = np.cumsum([rows * columns for _, rows, columns in sizes])[:-1]
    cut = np.split(pixels, ends)
    return [{PIXELS: _grid(part, rows, columns)} for part, (_, rows, columns) in zip(cut, sizes, strict=True)]
