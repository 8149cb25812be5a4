"""Pictures of any resolution in tiles: host code around a tower that sees one tile at a time.

An image processor fits a picture into the best of some resolutions, pads it, and cuts it into square tiles; the whole
picture as one tile comes first. After the projector the tiles' rows are laid out as the picture again, cut to
its own aspect ratio, and each line of it ends with a learned row (LLaVA-NeXT, LLaVA-OneVision).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError

Array = NDArray[Any]
PIXELS, SIZES, COUNTS = "pixel_values", "image_sizes", "batch_num_images"
_BY_PICTURE_DIMS = 5  # [pictures, tiles, channels, height, width]
# A picture is shrunk only when it has this much more lines than it may have.
_SLACK = 1.1


@dataclass(frozen=True)
class AnyRes:
    """How tiles and pictures belong together.

    `resolutions` are the (height, width) that pictures are fitted to, `tile` the side of a tile in pixels, `grid` the
    rows and columns of features of a tile. `newline`: the projector's last row ends every line. A picture of more
    rows than `max_tiles` tiles have is shrunk (0: never).
    """

    resolutions: tuple[tuple[int, int], ...]
    tile: int
    grid: int
    newline: bool
    max_tiles: int = 0

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AnyRes:
        """Read the dataclass's fields back from JSON."""
        return AnyRes(**{**data, "resolutions": tuple(tuple(r) for r in data["resolutions"])})

    def tiles(self, pixel_inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of the tower: ``pixel_values`` ``[tiles, channels, tile, tile]`` without tiles of padding."""
        pixels = pixel_inputs[PIXELS]
        if pixels.ndim == _BY_PICTURE_DIMS:
            counts = self.counts(pixel_inputs)
            pixels = np.concatenate([picture[:count] for picture, count in zip(pixels, counts, strict=True)])
        return {PIXELS: pixels}

    def counts(self, pixel_inputs: Mapping[str, Array]) -> list[int]:
        """Tiles of each picture, the whole one included; pictures that share a prompt with others may have no more."""
        sizes = pixel_inputs[SIZES].tolist()
        alone = [True] * len(sizes)
        if COUNTS in pixel_inputs:
            alone = [count == 1 for count in pixel_inputs[COUNTS].tolist() for _ in range(count)]
        return [1 + math.prod(self._tiling(size)) if one else 1 for size, one in zip(sizes, alone, strict=True)]

    def pack(self, rows: Array, pixel_inputs: Mapping[str, Array]) -> Array:
        """Features ``[image_tokens, hidden]`` of the projector's rows ``[tiles * grid * grid (+ 1), hidden]``.

        Raises `BadInputError` when the rows are not those of the pictures.
        """
        counts, each = self.counts(pixel_inputs), self.grid * self.grid
        if len(rows) != sum(counts) * each + self.newline:
            raise BadInputError(f"{sum(counts)} tiles of {each} features are to be packed, not {len(rows)} rows")
        line_end = rows[-1:] if self.newline else rows[:0]
        packed, start = [], 0
        for count, size in zip(counts, pixel_inputs[SIZES].tolist(), strict=True):
            whole, cut = rows[start : start + each], rows[start + each : start + count * each]
            start += count * each
            packed += [whole, line_end if count == 1 else self._lines(cut, size, line_end)]
        return np.concatenate(packed)

    def pooled(self, frames: Array, rows: Array, side: int) -> Array:
        """Features ``[frames * side * side (+ 1), hidden]`` of a video whose `frames` are tiles, from its rows.

        `rows` are as for `pack`, the tiles' grids resized to `side` x `side`. Raises `BadInputError` as `pack` does.
        """
        each = self.grid * self.grid
        if len(rows) != len(frames) * each + self.newline:
            raise BadInputError(f"{len(frames)} frames of {each} features are to be pooled, not {len(rows)} rows")
        grids = rows[: len(frames) * each].reshape(len(frames), self.grid, self.grid, -1)
        small = [_resized(grid, side, side).reshape(side * side, -1) for grid in grids]
        return np.concatenate([*small, rows[len(frames) * each :]])

    def _lines(self, rows: Array, size: tuple[int, int], line_end: Array) -> Array:
        down, across = self._tiling(size)
        picture = rows.reshape(down, across, self.grid, self.grid, -1).swapaxes(1, 2)
        picture = self._shrunk(_unpadded(picture.reshape(down * self.grid, across * self.grid, -1), size))
        ends = np.broadcast_to(line_end, (len(picture), *line_end.shape))
        return np.concatenate([picture, ends], axis=1).reshape(-1, rows.shape[-1])

    def _tiling(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tiles down and across: of the resolution that keeps most of a picture of `size`, and wastes least."""
        height, width = size

        def value(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[1] / width, resolution[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - resolution[0] * resolution[1]

        best = max(self.resolutions, key=value)
        return -(-best[0] // self.tile), -(-best[1] // self.tile)

    def _shrunk(self, picture: Array) -> Array:
        height, width = picture.shape[:2]
        ratio = math.sqrt(height * width / (self.max_tiles * self.grid**2)) if self.max_tiles else 0.0
        return _resized(picture, int(height // ratio), int(width // ratio)) if ratio > _SLACK else picture


def _unpadded(picture: Array, size: tuple[int, int]) -> Array:
    """``picture [height, width, hidden]`` without the lines or columns that only its padding has."""
    height, width = picture.shape[:2]
    if size[1] / size[0] > width / height:
        padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return picture[padding : height - padding]
    padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return picture[:, padding : width - padding]


def _resized(picture: Array, height: int, width: int) -> Array:
    """Bilinear, pixels being areas (not corners), as torch's ``interpolate`` computes it."""
    for axis, length in enumerate((height, width)):
        old = picture.shape[axis]
        scale, half = np.float32(old / length), np.float32(0.5)
        places = np.maximum(scale * (np.arange(length, dtype=np.float32) + half) - half, np.float32(0))
        low = places.astype(np.int64)
        share = (places - low).astype(picture.dtype).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        near, far = picture.take(low, axis), picture.take(np.minimum(low + 1, old - 1), axis)
        picture = near * (1 - share) + far * share
    return picture
