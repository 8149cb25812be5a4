"""Frames of a video and their times: a folder of pictures, or an animated picture file."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmexport.errors import BadInputError
from vlmexport.runtime.prompt import DAMAGED, load_image
from vlmexport.runtime.protocol import Array

if TYPE_CHECKING:
    from PIL.Image import Image

# Of all frames together: three bytes each, and the processor's copies of them.
MAX_PIXELS = 400_000_000
_FORMATS = ("GIF", "WEBP", "PNG")
_HOW = "make frames of it: ffmpeg -i {} -vf fps=2 frames/%04d.png, then --video frames --fps 2"


@dataclass(frozen=True)
class Video:
    """`frames` are RGB pictures of one size, `fps` of them a second."""

    frames: tuple[Image, ...]
    fps: float

    def pixels(self) -> Array:
        """uint8 ``[frames, 3, height, width]``."""
        return np.stack([np.asarray(frame) for frame in self.frames]).transpose(0, 3, 1, 2)

    def metadata(self) -> dict[str, Any]:
        """What transformers calls the metadata of a video: which frames there are, and when."""
        width, height = self.frames[0].size
        count = len(self.frames)
        return {
            "total_num_frames": count, "fps": self.fps, "width": width, "height": height,
            "duration": count / self.fps, "frames_indices": list(range(count)),
        }  # fmt: skip


def load_video(path: Path, fps: float | None = None) -> Video:
    """The frames of a folder of pictures, by name, or of an animated GIF, WebP or PNG.

    `fps` are frames a second; a folder needs it, a file's own durations count without it. Where these are not all the
    same, as many frames as the file has are taken at even times, each the one that is shown then.

    Raises `BadInputError` for anything else, for frames of different sizes and for more than `MAX_PIXELS` in all.
    """
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise BadInputError(f"{fps} frames a second are no times; give a number above 0")
    if path.is_dir():
        return _of_folder(path, fps)
    if not path.is_file():
        raise BadInputError(f"no such video: {path}")
    return _of_file(path, fps)


def _of_folder(folder: Path, fps: float | None) -> Video:
    files = sorted((f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")), key=_by_number)
    if not files:
        raise BadInputError(f"{folder} has no pictures; a video is a folder of frames or an animated file")
    if fps is None:
        raise BadInputError(f"{folder} is a folder of frames, which have no times: give --fps, frames a second")
    frames: list[Image] = []
    for file in files:
        frame = load_image(file)
        _check_room(folder, len(files), frame)
        if frame.size != (frames or [frame])[0].size:
            sizes = [f"{name.name} has {f.width}x{f.height}" for name, f in ((file, frame), (files[0], frames[0]))]
            raise BadInputError(f"{folder}: frames must have one size; {', '.join(sizes)} pixels")
        frames.append(frame)
    return Video(tuple(frames), fps)


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Names in the order of the numbers in them: 2 stands before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _of_file(path: Path, fps: float | None) -> Video:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as file:
                frames, durations = _animation(path, file)
    except UnidentifiedImageError as error:
        raise BadInputError(
            f"{path} is no folder of frames and no animated GIF, WebP or PNG; {_HOW.format(path.name)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadInputError(f"{path} has too many pixels: {error}") from error
    except DAMAGED as error:
        raise BadInputError(f"{path} is not a readable video: {error}") from error
    if fps is not None:
        return Video(tuple(frames), fps)
    if not all(duration > 0 for duration in durations):
        raise BadInputError(f"{path} has frames without a duration: give --fps, frames a second")
    return _evenly(frames, durations)


def _animation(path: Path, file: Any) -> tuple[list[Image], list[float]]:
    """The frames of an open picture file, and how many seconds each is shown (0 where it does not say)."""
    # The first picture of an animated PNG may be one for readers that know no animations.
    first, count = int(getattr(file, "default_image", False)), int(getattr(file, "n_frames", 1))
    if count - first < 2:
        raise BadInputError(f"{path} is one picture, no video: give it with --image")
    _check_room(path, count, file)
    frames, durations = [], []
    for index in range(first, count):
        file.seek(index)
        frames.append(file.convert("RGB"))
        durations.append(float(file.info.get("duration", 0)) / 1000)
    return frames, durations


def _evenly(frames: list[Image], durations: list[float]) -> Video:
    """As many frames at even times."""
    ends = np.cumsum(durations)
    fps = len(frames) / float(ends[-1])
    if np.allclose(durations, durations[0], rtol=0, atol=1e-9):
        return Video(tuple(frames), fps)
    shown = np.searchsorted(ends, np.arange(len(frames)) / fps + 1e-9, side="right")
    return Video(tuple(frames[index] for index in shown.tolist()), fps)


def _check_room(path: Path, count: int, frame: Image) -> None:
    if (pixels := count * frame.width * frame.height) > MAX_PIXELS:
        raise BadInputError(
            f"{path} has {count} frames of {frame.width}x{frame.height}, {pixels} pixels; the limit is {MAX_PIXELS}: "
            "take fewer or smaller frames (ffmpeg -vf fps=1,scale=640:-2)"
        )
