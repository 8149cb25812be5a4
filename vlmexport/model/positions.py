"""Positions on three axes (M-RoPE): where each token of a prompt stands in time, height and width.

Follows Qwen2-VL (arXiv:2409.12191, section 2.1): a text token has the same position on all axes; the tokens of an image
are a grid that starts where the text stopped, and the text behind it goes on after the grid's longer side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.model.merge import MergeSpec
from vlmexport.model.videos import GRID, IMAGE, SECONDS, TEXT, VIDEO, VIDEO_GRID, frame_times, runs, token_kinds

Ids: TypeAlias = NDArray[np.int64]
AXES = 3
_NAMES = {IMAGE: ("image", GRID), VIDEO: ("video", VIDEO_GRID)}


def prompt_positions(spec: MergeSpec, input_ids: Ids, pixel_inputs: Mapping[str, Any]) -> Ids:
    """Positions int64 ``[3, 1, tokens]`` of the prompt ``input_ids [1, tokens]`` without padding.

    `pixel_inputs` holds the images' patch grids as `GRID`, int ``[images, 3]`` (frames, rows, columns), and those of
    videos as `VIDEO_GRID`, with ``second_per_grid_ts`` ``[videos]`` where the model counts seconds. Raises
    `BadInputError` when the runs of image or video tokens are not those of the grids.
    """
    ids = input_ids[0]
    kinds = token_kinds(spec, ids)
    grids = {kind: list(_grids(spec, kind, pixel_inputs)) for kind in _NAMES}
    found = dict.fromkeys(grids, 0)
    pieces: list[Ids] = []
    position = 0
    for start, stop in runs(kinds):
        tokens, kind = stop - start, int(kinds[start])
        if kind == TEXT:
            pieces.append(np.tile(np.arange(position, position + tokens), (AXES, 1)))
            position += tokens
            continue
        noun, source = _NAMES[kind]
        if found[kind] == len(grids[kind]):
            raise BadInputError(
                f"the prompt has more runs of {noun} tokens than {source} has {noun}s ({len(grids[kind])})"
            )
        times, rows, columns = grids[kind][found[kind]]
        found[kind] += 1
        if len(times) * rows * columns != tokens:
            raise BadInputError(
                f"{noun} {found[kind]} has {len(times)} x {rows} x {columns} tokens by {source}, the prompt {tokens} "
                "in a row"
            )
        places = np.indices((len(times), rows, columns)).reshape(AXES, -1)
        places[0] = times[places[0]]
        pieces.append(places + position)
        position += max(rows, columns)
    for kind, (noun, source) in _NAMES.items():
        if found[kind] != len(grids[kind]):
            raise BadInputError(
                f"{source} has {len(grids[kind])} {noun}s, the prompt {found[kind]} runs of {noun} tokens"
            )
    return np.concatenate(pieces, axis=1)[:, None].astype(np.int64)


def _grids(spec: MergeSpec, kind: int, pixel_inputs: Mapping[str, Any]) -> Iterator[tuple[Ids, int, int]]:
    """Of each run of image or video tokens: its frames' positions in time, and its rows and columns of tokens."""
    source = _NAMES[kind][1]
    given = np.asarray(pixel_inputs[source]).tolist() if source in pixel_inputs else []
    seconds = np.asarray(pixel_inputs.get(SECONDS, np.ones(len(given)))).tolist()
    if spec.video is not None and kind == VIDEO and len(seconds) != len(given):
        raise BadInputError(f"{SECONDS} has {len(seconds)} videos, {VIDEO_GRID} {len(given)}")
    for index, grid in enumerate(given):
        frames, rows, columns = _merged_grid(grid, spec.spatial_merge_size)
        if kind == IMAGE or spec.video is None:
            yield np.arange(frames), rows, columns
        elif spec.video.each_frame:
            yield from ((np.zeros(1, np.int64), rows, columns) for _ in range(frames))
        else:
            yield frame_times(spec.video, frames, seconds[index]), rows, columns


def _merged_grid(grid: Sequence[int], merge: int) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens: `merge` x `merge` patches are one."""
    frames, rows, columns = grid
    return frames, rows // merge, columns // merge
