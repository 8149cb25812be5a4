"""Positions on three axes (M-RoPE): where each token of a prompt stands in time, height and width.

Follows Qwen2-VL (arXiv:2409.12191, section 2.1): a text token has the same position on all axes; the tokens of an image
are a grid that starts where the text stopped, and the text behind it goes on after the grid's longer side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.model.merge import MergeSpec

Ids: TypeAlias = NDArray[np.int64]
AXES = 3
GRID = "image_grid_thw"


def prompt_positions(spec: MergeSpec, input_ids: Ids, pixel_inputs: Mapping[str, Any]) -> Ids:
    """Positions int64 ``[3, 1, tokens]`` of the prompt ``input_ids [1, tokens]`` without padding.

    `pixel_inputs` holds the images' patch grids as `GRID`, int ``[images, 3]`` (frames, rows, columns). Raises
    `BadInputError` when the runs of image tokens are not those of the grids.
    """
    ids = input_ids[0]
    grids = [] if GRID not in pixel_inputs else np.asarray(pixel_inputs[GRID]).tolist()
    pieces: list[Ids] = []
    position, images = 0, 0
    for start, stop in _runs(ids == spec.image_token_id):
        tokens = stop - start
        if ids[start] != spec.image_token_id:
            pieces.append(np.tile(np.arange(position, position + tokens), (AXES, 1)))
            position += tokens
            continue
        if images == len(grids):
            raise BadInputError(f"the prompt has more runs of image tokens than {GRID} has images ({len(grids)})")
        frames, rows, columns = _merged_grid(grids[images], spec.spatial_merge_size)
        if frames * rows * columns != tokens:
            raise BadInputError(
                f"image {images + 1} has {frames} x {rows} x {columns} tokens by {GRID}, the prompt {tokens} in a row"
            )
        pieces.append(np.indices((frames, rows, columns)).reshape(AXES, -1) + position)
        position += max(rows, columns)
        images += 1
    if images != len(grids):
        raise BadInputError(f"{GRID} has {len(grids)} images, the prompt {images} runs of image tokens")
    return np.concatenate(pieces, axis=1)[:, None].astype(np.int64)


def _merged_grid(grid: Sequence[int], merge: int) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens: `merge` x `merge` patches are one."""
    frames, rows, columns = grid
    return frames, rows // merge, columns // merge


def _runs(images: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end of each run of equal values."""
    edges = [0, *(np.flatnonzero(images[1:] != images[:-1]) + 1).tolist(), len(images)]
    return list(pairwise(edges))
