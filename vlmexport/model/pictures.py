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
STRIPPED = "target_sizes"


@dataclass(frozen=True)
class EachPicture:
    """The tower takes ``pixel_values`` ``[1, channels, height, width]``; features are joined along `axis`.

    `patches`: the processor gives rows of patches ``[pictures, patches, values]`` with their ``spatial_shapes`` (rows,
    columns), or the patches of all ``[patches, values]`` with ``image_grid_thw`` (1, rows, columns), or those beside
    each other ``[1, channels, side, side * patches]`` with ``target_sizes`` (rows, columns); the tower takes those of
    one as ``[1, values, rows, columns]``, in their order. Features are joined as rows ``[rows, width]``.
    `fixed`: names of further inputs, integers ``[pictures]``, and the one number that each of them must be.
    """

    axis: int
    patches: bool = False
    fixed: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> EachPicture:
        """Read the data of ``dataclasses.asdict`` back."""
        return EachPicture(**{**data, "fixed": tuple((name, number) for name, number in data.get("fixed", ()))})

    def pictures(self, pixel_inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """The tower's inputs, one for each picture, without the padding beyond its size or its grid."""
        for name, number in self.fixed:
            if name in pixel_inputs and not (pixel_inputs[name] == number).all():
                raise BadInputError(f"{name} is {pixel_inputs[name].tolist()}; this export was made for {number} only")
        if self.patches and FRAMED in pixel_inputs:
            pixels = pixel_inputs[PIXELS]
            return _framed(pixels.reshape(len(pixels), -1), pixel_inputs[FRAMED].tolist(), FRAMED)
        if self.patches and STRIPPED in pixel_inputs:
            grids = [[1, *size] for size in pixel_inputs[STRIPPED].tolist()]
            return _framed(_patches(pixel_inputs[PIXELS]), grids, STRIPPED)
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


def _patches(strip: Array) -> Array:
    """Patches ``[patches, values]`` of a strip ``[1, channels, side, side * patches]``."""
    _, channels, side, length = strip.shape
    if length % side:
        raise BadInputError(f"{PIXELS} is {side} x {length}, which are no patches of {side} x {side} beside each other")
    return strip.reshape(channels, side, -1, side).transpose(2, 0, 1, 3).reshape(length // side, -1)


def _framed(pixels: Array, sizes: list[list[int]], named: str) -> list[dict[str, Array]]:
    """The pictures among the patches ``[patches, values]`` of all; `named` is the input that has their `sizes`."""
    total = sum(frames * rows * columns for frames, rows, columns in sizes)
    if total != len(pixels) or any(frames != 1 for frames, _, _ in sizes):
        raise BadInputError(f"{PIXELS} holds {len(pixels)} patches, {named} {sizes}; expected as many, in one frame")
    ends = np.cumsum([rows * columns for _, rows, columns in sizes])[:-1]
    cut = np.split(pixels, ends)
    return [{PIXELS: _grid(part, rows, columns)} for part, (_, rows, columns) in zip(cut, sizes, strict=True)]
