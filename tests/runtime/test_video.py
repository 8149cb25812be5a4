"""Reading frames and their times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmexport.errors import BadInputError
from vlmexport.runtime import video
from vlmexport.runtime.video import Video, load_video

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


def frames(count: int = 4, size: tuple[int, int] = (24, 16)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[i % 4]) for i in range(count)]


def folder(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for name, frame in zip(names, frames(len(names)), strict=True):
        frame.save(path / name)
    return path


def animation(path: Path, durations: list[int] | int, count: int = 4, **more: Any) -> Path:
    first, *rest = frames(count)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **more)
    return path


def colours(found: Video) -> list[int]:
    """Which of `COLOURS` each frame is."""
    means = [np.asarray(frame).mean((0, 1)) for frame in found.frames]
    return [int(np.argmin([np.abs(mean - colour).sum() for colour in COLOURS])) for mean in means]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    made = folder(tmp_path / "frames", ["f1.png", "f2.png", "f10.png", "f11.png"])
    (made / ".hidden").write_text("no picture")
    found = load_video(made, 2.0)
    assert colours(found) == [0, 1, 2, 3]
    assert found.fps == 2.0
    assert found.pixels().shape == (4, 3, 16, 24)
    assert found.pixels()[1, :, 5, 5].tolist() == [0, 250, 0]
    assert found.metadata() == {
        "total_num_frames": 4, "fps": 2.0, "width": 24, "height": 16, "duration": 2.0, "frames_indices": [0, 1, 2, 3],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_has_its_own_times(kind: str, tmp_path: Path) -> None:
    more = {"lossless": True} if kind == "webp" else {}
    found = load_video(animation(tmp_path / f"clip.{kind}", 200, **more))
    assert colours(found) == [0, 1, 2, 3]
    assert found.fps == pytest.approx(5.0)
    assert load_video(tmp_path / f"clip.{kind}", 1.5).fps == 1.5


def test_uneven_times_become_even_ones(tmp_path: Path) -> None:
    """Shown for 0.1, 0.5, 0.1 and 0.1 seconds: at 0, 0.2, 0.4 and 0.6 these are the first and, twice, the second."""
    found = load_video(animation(tmp_path / "clip.gif", [100, 500, 100, 100]))
    assert found.fps == pytest.approx(5.0)
    assert colours(found) == [0, 1, 1, 2]
    assert colours(load_video(tmp_path / "clip.gif", 5.0)) == [0, 1, 2, 3]


def test_the_picture_of_an_animated_png_for_old_readers_is_no_frame(tmp_path: Path) -> None:
    found = load_video(animation(tmp_path / "clip.png", 100, default_image=True))
    assert colours(found) == [1, 2, 3]


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0\0\0 ftypisom" + bytes(64))
    with pytest.raises(
        BadInputError, match=r"clip\.mp4 is no folder of frames .*ffmpeg -i clip\.mp4 -vf fps=2 frames/"
    ):
        load_video(clip)
    with pytest.raises(BadInputError, match=r"no such video: .*gone\.gif"):
        load_video(tmp_path / "gone.gif")
    frames()[0].save(tmp_path / "one.png")
    with pytest.raises(BadInputError, match=r"one\.png is one picture, no video: give it with --image"):
        load_video(tmp_path / "one.png")
    whole = animation(tmp_path / "whole.gif", 100).read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match=r"cut\.gif is "):
        load_video(tmp_path / "cut.gif")
    with pytest.raises(BadInputError, match="nan frames a second are no times"):
        load_video(tmp_path / "whole.gif", float("nan"))


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="empty has no pictures"):
        load_video(tmp_path / "empty", 1.0)
    made = folder(tmp_path / "frames", ["1.png", "2.png"])
    with pytest.raises(BadInputError, match="frames is a folder of frames, which have no times: give --fps"):
        load_video(made)
    Image.new("RGB", (8, 8)).save(made / "3.png")
    with pytest.raises(BadInputError, match=r"one size; 3\.png has 8x8, 1\.png has 24x16 pixels"):
        load_video(made, 1.0)
    (made / "3.png").write_text("no picture")
    with pytest.raises(BadInputError, match=r"3\.png is not a readable image"):
        load_video(made, 1.0)


def test_times_and_room_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = animation(tmp_path / "still.gif", 0)
    with pytest.raises(BadInputError, match=r"still\.gif has frames without a duration: give --fps"):
        load_video(still)
    assert load_video(still, 3.0).fps == 3.0
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    with pytest.raises(BadInputError, match=r"still\.gif has 4 frames of 24x16, 1536 pixels; the limit is 1000"):
        load_video(still, 3.0)
    with pytest.raises(BadInputError, match="frames has 3 frames of 24x16, 1152 pixels; the limit is 1000"):
        load_video(folder(tmp_path / "frames", ["1.png", "2.png", "3.png"]), 3.0)
