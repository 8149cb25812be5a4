"""Qwen's processors with a stand-in for their video half, which wants torchvision: Pillow resizes the frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.families.tiny_text import normalised

KINDS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


class FrameProcessor:
    """What the families' video processors make, of frames whose sides are rounded to whole tokens."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")
    merge_size = temporal_patch_size = 2
    do_sample_frames, fps, num_frames = False, None, None

    def __init__(self, patch: int) -> None:
        self.patch = patch

    def __call__(self, videos: list[Any], *, video_metadata: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        from transformers.video_utils import VideoMetadata

        made = [self._patches(np.asarray(video)) for video in videos]
        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in made]),
            "video_grid_thw": torch.tensor([grid for _, grid in made]),
            "video_metadata": [VideoMetadata(**one) for one in video_metadata],
        }

    def _patches(self, video: Any) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Of uint8 ``[frames, 3, height, width]``; an odd last frame is there twice."""
        patch, unit, every = self.patch, 2 * self.patch, len(video) + len(video) % 2
        height, width = (max(round(side / unit), 1) * unit for side in video.shape[2:])
        frames = [Image.fromarray(frame.transpose(1, 2, 0)).resize((width, height)) for frame in video]
        pixels = np.stack([normalised(frame) for frame in frames + frames[-1:] * (every - len(video))])
        rows, columns = height // patch, width // patch
        cut = pixels.reshape(every // 2, 2, 3, rows // 2, 2, patch, columns // 2, 2, patch)
        patches = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
        flat = patches.reshape(every // 2 * rows * columns, -1)
        return torch.from_numpy(np.ascontiguousarray(flat)), (every // 2, rows, columns)


def composed(folder: Any, **_: Any) -> Any:
    """A Qwen processor as ``AutoProcessor.from_pretrained`` gives it where torchvision is installed."""
    import pytest
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text())
    kind = getattr(transformers, KINDS[config["model_type"]])
    image = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
        return kind(
            image,
            tokenizer,
            FrameProcessor(config["vision_config"]["patch_size"]),
            chat_template=tokenizer.chat_template,
        )
