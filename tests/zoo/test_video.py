"""Videos in a prompt, alone and beside a picture: the exported graphs against the whole PyTorch model.

The graphs are traced with pictures of one frame; grids here have two to four frames and sizes that were not traced.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.families.tiny_qwen import image_inputs
from tests.families.tiny_text import picture
from tests.zoo import registry
from tests.zoo.proof import FLOATS, STEPS, Zooed, export, relative
from tests.zoo.qwen import load_qwen, prompts
from vlmexport.errors import BadInputError
from vlmexport.model.merge import MergeSpec
from vlmexport.model.positions import prompt_positions
from vlmexport.model.videos import VideoSpec, as_pictures
from vlmexport.runtime.decoder_inputs import encoded_pictures, with_features
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split import videos
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import capture_decoder_call

LIMIT = 1e-4
# Tokens below stand for pictures and marks, which an answer has none of.
_WORDS = 20
FOUND = {
    "qwen2_vl": VideoSpec(6),
    "qwen2_5_vl": VideoSpec(6, per_second=4.0),
    "qwen3_vl": VideoSpec(6, each_frame=True),
}
Grid = tuple[int, int, int]
# Frames, rows and columns of patches of each video, and whether a picture stands before, between or behind them.
PROMPTS: dict[str, tuple[tuple[str, Grid], ...]] = {
    "a video": (("video", (3, 8, 12)),),
    "a video, then a picture": (("video", (2, 4, 10)), ("image", (1, 6, 8))),
    "a picture between videos": (("video", (4, 4, 4)), ("image", (1, 12, 4)), ("video", (2, 10, 18))),
}
_ALL = [
    pytest.param(family, marks=[pytest.mark.slow] if family == "qwen3_vl" else [pytest.mark.slow, pytest.mark.family])
    for family in FOUND
]
Example = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=_ALL)
def zooed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    vlm = load_qwen(request.param, tmp_path_factory.mktemp(request.param))
    return Zooed(vlm, split_model(vlm, prompts(vlm)), prompts(vlm))


def prompt(zooed: Zooed, pieces: tuple[tuple[str, Grid], ...]) -> Example:
    """What the family's processor makes: marks around every video or picture, or around every frame."""
    config = zooed.vlm.model.config
    patch, apart = config.vision_config.patch_size, FOUND[zooed.vlm.facts.model_type].each_frame
    words, made = [torch.arange(40, 43)], {"image": [], "video": []}  # type: ignore[var-annotated]
    for index, (kind, (frames, rows, columns)) in enumerate(pieces):
        token = config.video_token_id if kind == "video" else config.image_token_id
        pixels = [picture(columns * patch, rows * patch, seed=10 * index + f) for f in range(frames)]
        made[kind].append(
            (torch.cat([image_inputs(p, patch)["pixel_values"] for p in pixels]), (frames, rows, columns))
        )
        count = rows * columns // 4
        runs = [count] * frames if kind == "video" and apart else [count * frames]
        for number, length in enumerate(runs):
            start, end = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
            words += [torch.tensor([50 + number]), start, torch.full((length,), token), end]
    ids = torch.cat([*words, torch.arange(80, 85)])[None]
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    for kind, (pixel_name, grid_name) in {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }.items():
        if made[kind]:
            found[pixel_name] = torch.cat([patches for patches, _ in made[kind]])
            found[grid_name] = torch.tensor([grid for _, grid in made[kind]])
    if FOUND[zooed.vlm.facts.model_type].per_second:
        found["second_per_grid_ts"] = torch.tensor([0.7, 1.9])[: len(made["video"])]
    return found


def inputs_of(example: Example) -> ModelInputs:
    text = ("input_ids", "attention_mask", "mm_token_type_ids")
    return ModelInputs(example["input_ids"].numpy(), {n: t.numpy() for n, t in example.items() if n not in text})


def whole_model(zooed: Zooed, example: Example, answer: list[int]) -> np.ndarray:
    """Logits of the whole model for the prompt with `answer` behind it."""
    more = torch.tensor([answer], dtype=torch.int64)
    longer = {
        **example,
        "input_ids": torch.cat([example["input_ids"], more], dim=1),
        "attention_mask": torch.ones(1, example["input_ids"].shape[1] + len(answer), dtype=torch.int64),
        "mm_token_type_ids": torch.cat([example["mm_token_type_ids"], torch.zeros_like(more).int()], dim=1),
    }
    with torch.no_grad():
        return zooed.vlm.model(**longer, use_cache=False).logits.numpy()


def test_places_and_positions_are_found_and_are_the_models(zooed: Zooed) -> None:
    merge = zooed.split.merge
    assert merge.video == FOUND[zooed.vlm.facts.model_type]
    assert MergeSpec.from_dict(merge.to_dict()) == merge
    for pieces in PROMPTS.values():
        example = prompt(zooed, pieces)
        item = inputs_of(example)
        given = capture_decoder_call(zooed.vlm.model, example).kwargs["position_ids"]
        assert np.array_equal(prompt_positions(merge, item.input_ids, item.pixel_inputs), given.numpy())


def test_onnx_is_the_whole_model_for_videos_through_decode_steps(zooed: Zooed, tmp_path: Path) -> None:
    """Embeddings of words are PyTorch's: the export's table is FP16. Features of videos are the export's."""
    ours, theirs = (
        OnnxRunner(export(zooed, FLOATS, tmp_path), threads=1, exact=True),
        TorchRunner(zooed.vlm, zooed.split),
    )
    for pieces in PROMPTS.values():
        example = prompt(zooed, pieces)
        item = inputs_of(example)
        inputs, mask = with_features(theirs, [item], encoded_pictures(ours, [item]))
        logits, cache = inputs.prefill(ours, mask, 0)
        assert relative(logits, whole_model(zooed, example, [])) <= LIMIT
        answer: list[int] = []
        found = []
        for _ in range(STEPS):
            answer.append(_WORDS + int(logits[0, -1, _WORDS:].argmax()))
            logits = ours.decode(theirs.embed(np.array([[answer[-1]]])), cache)
            found.append(logits)
        wanted = whole_model(zooed, example, answer)[:, -STEPS:]
        assert relative(np.concatenate(found, axis=1), wanted) <= LIMIT


def test_the_answer_depends_on_the_order_of_frames(zooed: Zooed) -> None:
    """A graph that mixed frames up would not be seen by pictures alone."""
    example = prompt(zooed, PROMPTS["a video"])
    rows = example["pixel_values_videos"].reshape(3, -1, example["pixel_values_videos"].shape[1])
    other = {**example, "pixel_values_videos": rows.flip(0).flatten(0, 1)}
    assert relative(whole_model(zooed, other, []), whole_model(zooed, example, [])) > 10 * LIMIT


def test_a_rule_that_is_not_the_models_is_not_taken(zooed: Zooed, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FOUND[zooed.vlm.facts.model_type]
    # One position a second is one a frame where no length of frames is given: the wrong rule needs more than that.
    wrong = dataclasses.replace(right, per_second=right.per_second + 3) if not right.each_frame else VideoSpec(6)
    monkeypatch.setattr(videos, "_candidates", lambda _vlm: [wrong])
    roles = list(zooed.split.parts.values())
    merge = dataclasses.replace(zooed.split.merge, video=None)
    found, notes = videos.with_videos(zooed.vlm, merge, (roles[0], roles[1]), zooed.examples[0])
    assert found.video is None
    assert len(notes) == 1 and notes[0].startswith("videos are left out, pictures are not: ")


def _refused(*_: object) -> None:
    raise TypeError("no such\nargument")


def test_what_a_model_raises_for_a_video_is_kept_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_prompt", lambda *_: {})
    monkeypatch.setattr(videos, "capture_decoder_call", _refused)
    monkeypatch.setattr(videos, "_candidates", lambda _vlm: [VideoSpec(6), VideoSpec(6, each_frame=True)])
    merge, example = MergeSpec(5, position="mrope"), {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    given: Any = (SimpleNamespace(model=None), merge, (), example)
    reason = "for the layouts that are known, the model raises TypeError: no such argument"
    assert videos.with_videos(*given) == (merge, (f"videos are left out, pictures are not: {reason}",))
    monkeypatch.setattr(videos, "_candidates", lambda _vlm: [])
    monkeypatch.setattr(videos, "_takes_videos", lambda _vlm: False)
    assert videos.with_videos(*given) == (merge, ())


class _TakesVideos:
    def forward(self, input_ids: Any = None, pixel_values_videos: Any = None) -> None: ...


class _TakesNone:
    def forward(self, input_ids: Any = None, pixel_values: Any = None) -> None: ...


def test_a_model_whose_videos_enter_otherwise_says_so() -> None:
    """As Video-LLaVA: positions of one axis, no grid, a tower of its own."""
    merge, example = MergeSpec(5), {"pixel_values": torch.zeros(1)}
    takes: Any = SimpleNamespace(model=_TakesVideos())
    found, notes = videos.with_videos(takes, merge, ((), ()), example)  # type: ignore[arg-type]
    assert found == merge
    assert notes == (
        "videos are left out, pictures are not: pixel_values_videos enter this model in a way of their own, which no "
        "part of an export has",
    )
    none: Any = SimpleNamespace(model=_TakesNone())
    assert videos.with_videos(none, merge, ((), ()), example) == (merge, ())  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.family
@pytest.mark.parametrize("family", ["llava_next_video", "video_llava"])
def test_families_whose_videos_enter_otherwise_say_so(family: str, tmp_path: Path) -> None:
    vlm, examples = registry.make(family, tmp_path / "model")
    split = split_model(vlm, examples)
    assert split.merge.video is None
    assert [note for note in split.notes if note.startswith("videos are left out, pictures are not: ")]


_SPEC = MergeSpec(image_token_id=5, position="mrope", spatial_merge_size=2, video=VideoSpec(6))


def _given(grids: list[Grid], name: str = "video_grid_thw") -> dict[str, np.ndarray]:
    patches = sum(int(np.prod(grid)) for grid in grids)
    pixels = "pixel_values_videos" if name.startswith("video") else "pixel_values"
    return {pixels: np.arange(patches, dtype=np.float32)[:, None], name: np.array(grids)}


def test_videos_and_pictures_are_encoded_in_the_order_of_the_prompt() -> None:
    ids = np.array([[1, 6, 6, 2, 5, 3, 6, 6, 6]])
    given = {**_given([(2, 2, 2), (3, 2, 2)]), **_given([(1, 2, 2)], "image_grid_thw")}
    given["pixel_values"] += 100
    found, pixels = as_pictures(_SPEC, ids, given)
    assert found.tolist() == [[1, 5, 5, 2, 5, 3, 5, 5, 5]]
    assert pixels["image_grid_thw"].tolist() == [[2, 2, 2], [1, 2, 2], [3, 2, 2]]
    assert pixels["pixel_values"][:, 0].tolist() == [*range(8), *range(100, 104), *range(8, 20)]
    assert pixels.keys() == {"pixel_values", "image_grid_thw"}


def test_every_frame_for_itself_is_one_video() -> None:
    spec = dataclasses.replace(_SPEC, video=VideoSpec(6, each_frame=True))
    ids = np.array([[1, 6, 2, 6, 3]])
    _, pixels = as_pictures(spec, ids, _given([(2, 2, 2)]))
    assert pixels["image_grid_thw"].tolist() == [[2, 2, 2]]
    assert prompt_positions(spec, ids, _given([(2, 2, 2)]))[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_time_is_counted_in_seconds_and_cut_to_whole_positions() -> None:
    spec = dataclasses.replace(_SPEC, video=VideoSpec(6, per_second=2.0))
    ids, given = np.array([[1, 6, 6, 6, 9]]), {**_given([(3, 2, 2)]), "second_per_grid_ts": np.array([0.7])}
    assert prompt_positions(spec, ids, given)[:, 0].tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 1, 2], [0, 1, 1, 1, 2]]


def test_what_does_not_fit_is_refused() -> None:
    ids, given = np.array([[1, 6, 6, 2]]), _given([(2, 2, 2)])
    without = dataclasses.replace(_SPEC, video=None)
    with pytest.raises(BadInputError, match="videos of this model are not supported; give pictures"):
        as_pictures(without, ids, given)
    with pytest.raises(BadInputError, match="the prompt has more pictures or videos than"):
        as_pictures(_SPEC, np.array([[6, 6, 2, 6]]), given)
    with pytest.raises(BadInputError, match="have more pictures or videos than the prompt"):
        as_pictures(_SPEC, np.array([[1, 2]]), given)
    with pytest.raises(BadInputError, match="video 1 has 2 x 1 x 1 tokens by video_grid_thw, the prompt 3 in a row"):
        prompt_positions(_SPEC, np.array([[6, 6, 6]]), given)
    with pytest.raises(BadInputError, match="second_per_grid_ts has 2 videos, video_grid_thw 1"):
        prompt_positions(_SPEC, ids, {**given, "second_per_grid_ts": np.ones(2)})
