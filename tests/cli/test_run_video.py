"""``vlmexport run --video``: what it says of videos that cannot be taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from vlmexport.cli.main import run


def test_the_command_says_what_is_wrong(tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (24, 16), (i, 0, 0)) for i in (0, 120, 250)]
    clip_file = tmp_path / "clip.gif"
    frames[0].save(clip_file, save_all=True, append_images=frames[1:], duration=100)

    def said(*arguments: str) -> str:
        assert run(["run", str(tiny_export), "--prompt", "?", *arguments]) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    assert "the model's processor takes no videos" in said("--video", str(clip_file))
    assert "give --fps" in said("--video", str(tmp_path))
    assert "ffmpeg -i clip.mp4" in said("--video", str(_written(tmp_path / "clip.mp4")))
    assert "--fps is of a video" in said("--fps", "2")


def _written(file: Path) -> Path:
    file.write_bytes(bytes(64))
    return file


def test_without_torchvision_the_command_says_so(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found. See\nmore\n")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    Image.new("RGB", (24, 16)).save(tmp_path / "1.png")
    assert run(["run", str(tiny_export), "--prompt", "?", "--video", str(tmp_path), "--fps", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("requires the Torchvision library but it was not found; pip install torchvision")
    assert "\n" not in error
