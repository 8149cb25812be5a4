"""Videos of a prompt: the graph that takes pictures encodes their frames, and positions count their time.

Follows Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923): a video is a grid of patches with several frames,
and the decoder's first axis of positions counts frames or what time went by. Qwen3-VL writes every frame for itself,
behind the time as text. LLaVA-OneVision (arXiv:2408.03326): each frame is a tile, whose features are resized to fewer,
and one learned row ends the video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from vlmexport.model.merge import MergeSpec

Ids: TypeAlias = NDArray[np.int64]
Inputs: TypeAlias = Mapping[str, NDArray[Any]]
PIXELS, GRID = "pixel_values", "image_grid_thw"
VIDEO_PIXELS, VIDEO_GRID, SECONDS = "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"
# As in transformers' ``mm_token_type_ids``.
TEXT, IMAGE, VIDEO = 0, 1, 2


@dataclass(frozen=True)
class VideoSpec:
    """How videos enter the decoder: their features take the places of `token_id`.

    `each_frame`: every frame is a run of tokens of its own, with text between. `per_second`: positions in time that a
    second is long, of which ``second_per_grid_ts`` says how many a frame takes (1 where it is not given); 0 for one
    position a frame. `pool`: above 0, frames are tiles without a grid ``[videos, frames, 3, tile, tile]``, of whose
    features `pool` x `pool` are left, and the row that ends the lines of pictures ends the video.
    """

    token_id: int
    each_frame: bool = False
    per_second: float = 0.0
    pool: int = 0


def token_kinds(spec: MergeSpec, ids: Ids) -> Ids:
    """`TEXT`, `IMAGE` or `VIDEO` for each of `ids`."""
    kinds = (ids == spec.image_token_id) * IMAGE
    return kinds if spec.video is None else np.where(ids == spec.video.token_id, VIDEO, kinds)


def runs(values: NDArray[Any]) -> list[tuple[int, int]]:
    """Start and end of each run of equal values."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(pairwise(edges))


def frame_times(video: VideoSpec, frames: int, seconds: float) -> Ids:
    """Positions in time of a video's frames behind its start, int64 ``[frames]``."""
    count = np.arange(frames)
    if not video.per_second:
        return count
    return (count.astype(np.float32) * np.float32(video.per_second * np.float32(seconds))).astype(np.int64)


def as_pictures(spec: MergeSpec, input_ids: Ids, pixel_inputs: Inputs) -> tuple[Ids, dict[str, NDArray[Any]]]:
    """A prompt ``[1, tokens]`` and its pixels with videos as pictures of several frames, in the order of the prompt.

    Prompts without videos are given back as they are; so are the pixels of frames that are tiles (`pooled_features`).
    Raises `BadInputError` for a video where the model has no place
    for one, and when the runs of tokens are not those of the grids.
    """
    given = dict(pixel_inputs)
    if VIDEO_GRID not in given and VIDEO_PIXELS not in given:
        return input_ids, given
    if spec.video is not None and spec.video.pool and VIDEO_GRID not in given:
        return np.where(input_ids == spec.video.token_id, spec.image_token_id, input_ids), given
    if spec.video is None or spec.video.pool or VIDEO_GRID not in given:
        raise BadInputError(f"the prompt has {VIDEO_PIXELS}, but videos of this model are not supported; give pictures")
    waiting = {IMAGE: _pieces(given, PIXELS, GRID), VIDEO: _pieces(given, VIDEO_PIXELS, VIDEO_GRID)}
    grids, pixels = [], []
    for kind in _order(spec, input_ids[0], given):
        piece, grid = next(waiting[kind], (None, None))
        if piece is None or grid is None:
            raise BadInputError(f"the prompt has more pictures or videos than {GRID} and {VIDEO_GRID} have")
        pixels.append(piece)
        grids.append(grid)
    if any(next(rest, None) is not None for rest in waiting.values()):
        raise BadInputError(f"{GRID} and {VIDEO_GRID} have more pictures or videos than the prompt")
    others = {n: a for n, a in given.items() if n not in (PIXELS, GRID, VIDEO_PIXELS, VIDEO_GRID, SECONDS)}
    ids = np.where(input_ids == spec.video.token_id, spec.image_token_id, input_ids)
    return ids, {**others, PIXELS: np.concatenate(pixels), GRID: np.stack(grids)}


def has_tiles(spec: MergeSpec, pixel_inputs: Inputs) -> bool:
    """Are there videos whose frames are tiles?"""
    return spec.video is not None and spec.video.pool > 0 and VIDEO_PIXELS in pixel_inputs


def pooled_features(
    spec: MergeSpec,
    input_ids: Ids,
    pixel_inputs: Inputs,
    of_pictures: Callable[[Inputs], NDArray[Any]],
    of_tiles: Callable[[Inputs], NDArray[Any]],
) -> NDArray[Any]:
    """Features ``[tokens, hidden]`` of a prompt ``[1, tokens]`` with videos whose frames are tiles, in its order.

    `of_pictures` gives those of pictures, as they are merged, `of_tiles` the projector's rows of tiles. Raises
    `BadInputError` when the prompt has not as many tokens of each.
    """
    packing, video = spec.packing, spec.video
    if packing is None or video is None:
        raise BadInputError("the model has no rule for frames that are tiles")
    rest = {name: array for name, array in pixel_inputs.items() if name != VIDEO_PIXELS}
    made = [packing.pooled(clip, of_tiles({PIXELS: clip}), video.pool) for clip in pixel_inputs[VIDEO_PIXELS]]
    features = {VIDEO: np.concatenate(made)}
    if PIXELS in rest:
        features[IMAGE] = of_pictures(rest)
    kinds = token_kinds(spec, input_ids[0])
    kinds = kinds[kinds != TEXT]
    for kind, noun in ((IMAGE, "pictures"), (VIDEO, "videos")):
        count, rows = int((kinds == kind).sum()), len(features.get(kind, ()))
        if count != rows:
            raise BadInputError(f"the prompt has {count} tokens of {noun}, their pixels make {rows} features")
    joined = np.empty((len(kinds), made[0].shape[1]), made[0].dtype)
    for kind, found in features.items():
        joined[kinds == kind] = found
    return joined


def _order(spec: MergeSpec, ids: Ids, given: Inputs) -> Iterator[int]:
    """`IMAGE` or `VIDEO` for each of the prompt's, in order."""
    kinds, frames = token_kinds(spec, ids), iter(np.asarray(given[VIDEO_GRID])[:, 0].tolist())
    left = 0
    for start, _ in runs(kinds):
        kind = int(kinds[start])
        if kind == VIDEO and spec.video is not None and spec.video.each_frame:
            if left:
                left -= 1
                continue
            left = next(frames, 1) - 1
        if kind != TEXT:
            yield kind


def _pieces(given: Inputs, pixels: str, grid: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The patches of each picture or video, and its grid."""
    if grid not in given:
        return
    grids = np.asarray(given[grid])
    ends = np.cumsum(grids.prod(axis=1))
    for end, size in zip(ends.tolist(), grids, strict=True):
        yield given[pixels][end - int(size.prod()) : end], size
