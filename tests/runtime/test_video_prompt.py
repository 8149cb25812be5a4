"""Prompts about videos: by Qwen's processors with a stand-in for their video half, and by processors that take none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from tests.families.tiny_qwen import make_tiny_qwen
from tests.families.tiny_text import picture
from tests.families.video_processor import composed
from vlmexport.errors import BadInputError
from vlmexport.model.merge import MergeSpec
from vlmexport.model.videos import VideoSpec
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.video import Video
from vlmexport.runtime.video_prompt import build_video_prompt, require_video_inputs

VIDEO_TOKEN = 6


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture
def builder(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> PromptBuilder:
    monkeypatch.setattr(AutoProcessor, "from_pretrained", staticmethod(composed))
    return PromptBuilder(qwen)


def clip(frames: int = 5, fps: float = 4.0) -> Video:
    return Video(tuple(picture(112, 56, seed=i) for i in range(frames)), fps)


def test_a_video_stands_between_the_pictures_and_the_text(builder: PromptBuilder) -> None:
    made = build_video_prompt(builder, [picture(56, 56)], clip(), "What happens?")
    assert made.pixel_inputs["video_grid_thw"].tolist() == [[3, 4, 8]]
    assert made.pixel_inputs["second_per_grid_ts"].tolist() == [0.5]
    ids = made.input_ids[0].tolist()
    assert ids.count(VIDEO_TOKEN) == 3 * 2 * 4
    assert ids.index(5) < ids.index(VIDEO_TOKEN)
    shown = builder.tokenizer.decode(ids)
    assert shown.index("<|video_pad|>") < shown.index("What happens?")


def test_frames_reach_the_processor_as_they_are(builder: PromptBuilder) -> None:
    seen: dict[str, Any] = {}
    real = builder.processor.video_processor.__class__.__call__

    def watch(self: Any, videos: Any, **more: Any) -> Any:
        seen.update(more, videos=videos)
        return real(self, videos, **more)

    maker = type("Watched", (builder.processor.video_processor.__class__,), {"__call__": watch})
    builder.processor.video_processor = maker(14)
    build_video_prompt(builder, [], clip(2), "?")
    assert [np.array_equal(v, clip(2).pixels()) for v in seen["videos"]] == [True]
    assert seen["video_metadata"][0]["duration"] == 0.5
    assert seen["do_sample_frames"] is False
    builder.processor.video_processor.fps, builder.processor.video_processor.num_frames = 1, 64
    build_video_prompt(builder, [], clip(2), "?")
    assert seen["do_sample_frames"] is True


def test_what_a_processor_cannot_do_is_one_line(builder: PromptBuilder, tiny_idefics3: Path) -> None:
    with pytest.raises(BadInputError, match=r"writes 2 places '<\|video_pad\|>' for one video"):
        build_video_prompt(builder, [], clip(), "a <|video_pad|> of mine")
    builder.processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(BadInputError, match="the chat template writes 0 places"):
        build_video_prompt(builder, [], clip(), "?")
    builder.processor.chat_template = "<|video_pad|>"

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such\nnumber of frames")

    builder.processor.video_processor = SimpleNamespace(model_input_names=("pixel_values",))
    with pytest.raises(BadInputError, match="makes pixel_values of pictures and of videos, so a prompt has the one or"):
        build_video_prompt(builder, [picture(56, 56)], clip(), "?")
    builder.encode = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(BadInputError, match="refuses a video of 5 frames: no such number of frames"):
        build_video_prompt(builder, [], clip(), "?")


def test_a_processor_of_pictures_alone_is_named(tiny_idefics3: Path) -> None:
    with pytest.raises(BadInputError, match="the model's processor takes no videos; give pictures with --image"):
        build_video_prompt(PromptBuilder(tiny_idefics3), [], clip(), "?")


def export_of(video: VideoSpec | None, *inputs: str) -> Any:
    part = SimpleNamespace(inputs=[SimpleNamespace(name=name) for name in inputs])
    model = {"merge": MergeSpec(5, video=video).to_dict()}
    return SimpleNamespace(path="out", manifest=SimpleNamespace(model=model, parts={"vision_encoder": part}))


def made_of(*names: str) -> ModelInputs:
    return ModelInputs(np.array([[1]]), {name: np.zeros(1) for name in names})


def test_an_export_takes_frames_as_pictures_or_by_its_rule() -> None:
    require_video_inputs(export_of(None, "pixel_values", "mask"), made_of("pixel_values"))
    require_video_inputs(export_of(VideoSpec(6)), made_of("pixel_values_videos", "video_grid_thw"))
    with pytest.raises(BadInputError, match="videos of this model are not supported; give pictures with --image"):
        require_video_inputs(export_of(None, "pixel_values"), made_of("pixel_values_videos"))
    with pytest.raises(BadInputError, match="the processor makes sound of a video, which the export does not take"):
        require_video_inputs(export_of(None, "pixel_values"), made_of("pixel_values", "sound"))
    with pytest.raises(BadInputError, match="makes nothing of a video"):
        require_video_inputs(export_of(None, "pixel_values"), made_of())
