"""Videos whose frames are tiles (LLaVA-OneVision), alone and beside a picture: the exported graphs against PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.zoo.proof import FLOATS, STEPS, Zooed, export, relative, take_apart
from vlmexport.errors import BadInputError
from vlmexport.model.anyres import AnyRes
from vlmexport.model.merge import MergeSpec
from vlmexport.model.videos import VideoSpec, as_pictures, pooled_features
from vlmexport.runtime.decoder_inputs import encoded_pictures, with_features
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split import videos

LIMIT = 1e-4
_WORDS = 20


@pytest.fixture(scope="module")
def zooed(tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    return take_apart("llava_onevision", tmp_path_factory.mktemp("tiles") / "model")


def prompt(zooed: Zooed, order: str, frames: int) -> dict[str, torch.Tensor]:
    """A prompt with a video (v) of `frames` and pictures (p), which are those of the first example."""
    merge, example = zooed.split.merge, zooed.examples[0]
    assert merge.video is not None
    image = example["input_ids"][0]
    counts = {"v": frames * merge.video.pool**2 + 1, "p": int((image == merge.image_token_id).sum())}
    tokens = {"v": merge.video.token_id, "p": merge.image_token_id}
    pieces = [torch.arange(40, 43)]
    for letter in order:
        pieces += [torch.full((counts[letter],), tokens[letter]), torch.arange(60, 62)]
    ids = torch.cat(pieces)[None]
    noise = torch.randn(1, frames, 3, 32, 32, generator=torch.Generator().manual_seed(frames))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": noise}
    return given | ({n: example[n] for n in ("pixel_values", "image_sizes")} if "p" in order else {})


def inputs_of(example: dict[str, torch.Tensor]) -> ModelInputs:
    text = ("input_ids", "attention_mask")
    return ModelInputs(example["input_ids"].numpy(), {n: t.numpy() for n, t in example.items() if n not in text})


def whole_model(zooed: Zooed, example: dict[str, torch.Tensor], answer: list[int]) -> np.ndarray:
    ids = torch.cat([example["input_ids"], torch.tensor([answer], dtype=torch.int64)], dim=1)
    longer = {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return zooed.vlm.model(**longer, use_cache=False).logits.numpy()


@pytest.mark.slow
def test_the_rule_is_found(zooed: Zooed) -> None:
    merge = zooed.split.merge
    assert merge.video == VideoSpec(merge.image_token_id + 1, pool=2)
    assert zooed.split.notes == ()
    assert MergeSpec.from_dict(merge.to_dict()) == merge


@pytest.mark.slow
@pytest.mark.family
def test_onnx_is_the_whole_model_through_decode_steps(zooed: Zooed, tmp_path: Path) -> None:
    """Embeddings of words are PyTorch's: the export's table is FP16. Features of videos are the export's."""
    ours = OnnxRunner(export(zooed, FLOATS, tmp_path), threads=1, exact=True)
    theirs = TorchRunner(zooed.vlm, zooed.split)
    for order, frames in (("v", 3), ("vp", 2), ("pv", 5)):
        example = prompt(zooed, order, frames)
        item = inputs_of(example)
        inputs, mask = with_features(theirs, [item], encoded_pictures(ours, [item]))
        logits, cache = inputs.prefill(ours, mask, 0)
        wanted = whole_model(zooed, example, [])
        assert relative(logits, wanted) <= LIMIT
        answer: list[int] = []
        found = []
        for _ in range(STEPS):
            answer.append(_WORDS + int(logits[0, -1, _WORDS:].argmax()))
            logits = ours.decode(theirs.embed(np.array([[answer[-1]]])), cache)
            found.append(logits)
        assert relative(np.concatenate(found, axis=1), whole_model(zooed, example, answer)[:, -STEPS:]) <= LIMIT
        other = {**example, "pixel_values_videos": example["pixel_values_videos"].flip(1)}
        assert relative(whole_model(zooed, other, []), wanted) > 10 * LIMIT


@pytest.mark.slow
def test_a_rule_that_is_not_the_models_is_not_taken(zooed: Zooed, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = list(zooed.split.parts.values())
    right = AnyRes.pooled
    monkeypatch.setattr(AnyRes, "pooled", lambda *given: right(*given) * 1.001)
    merge = dataclasses.replace(zooed.split.merge, video=None)
    found, notes = videos.with_videos(zooed.vlm, merge, (roles[0], roles[1]), zooed.examples[0])
    assert found.video is None
    assert len(notes) == 1
    assert notes[0].startswith("videos are left out, pictures are not: pixel_values_videos enter this model")
    monkeypatch.undo()
    monkeypatch.setattr(videos, "capture_decoder_call", _refused)
    _, notes = videos.with_videos(zooed.vlm, merge, (roles[0], roles[1]), zooed.examples[0])
    assert notes[0].endswith("with frames as tiles the model raises TypeError: no such argument")


def _refused(*_: object) -> None:
    raise TypeError("no such\nargument")


SPEC = MergeSpec(5, packing=AnyRes(((4, 4),), 4, 4, newline=True), video=VideoSpec(6, pool=2))


def test_features_stand_in_the_order_of_the_prompt() -> None:
    """Of a frame of 4 x 4 features 2 x 2 means are left, of pictures all."""
    frame = np.arange(16, dtype=np.float32)[:, None]
    given = {"pixel_values_videos": np.zeros((1, 1, 3, 4, 4)), "pixel_values": np.zeros(1)}
    ids = np.array([[5, 1, 6, 6, 6, 6, 6, 2, 5]])
    end, pictures = np.array([[99.0]], np.float32), np.array([[-1.0], [-2.0]], np.float32)
    rows = pooled_features(SPEC, ids, given, lambda _: pictures, lambda _: np.concatenate([frame, end]))
    assert rows[:, 0].tolist() == [-1.0, 2.5, 4.5, 10.5, 12.5, 99.0, -2.0]
    assert as_pictures(SPEC, ids, given)[0].tolist() == [[5, 1, 5, 5, 5, 5, 5, 2, 5]]


def test_what_does_not_fit_is_refused() -> None:
    given = {"pixel_values_videos": np.zeros((1, 1, 3, 4, 4))}
    rows: Any = np.zeros((17, 1), np.float32)
    with pytest.raises(BadInputError, match="the prompt has 2 tokens of videos, their pixels make 5 features"):
        pooled_features(SPEC, np.array([[6, 6]]), given, lambda _: rows, lambda _: rows)
    with pytest.raises(BadInputError, match="1 frames of 16 features are to be pooled, not 3 rows"):
        pooled_features(SPEC, np.array([[6, 6]]), given, lambda _: rows, lambda _: rows[:3])
    with pytest.raises(BadInputError, match="the model has no rule for frames that are tiles"):
        pooled_features(MergeSpec(5), np.array([[6]]), given, lambda _: rows, lambda _: rows)
    with pytest.raises(BadInputError, match="videos of this model are not supported"):
        as_pictures(SPEC, np.array([[6]]), {"video_grid_thw": np.ones((1, 3))})


def test_a_model_without_a_token_for_videos_says_so() -> None:
    class Takes:
        config = SimpleNamespace()

        def forward(self, pixel_values_videos: Any = None) -> None: ...

    merge, vlm = MergeSpec(5, packing=SPEC.packing), SimpleNamespace(model=Takes())
    found, notes = videos.with_videos(vlm, merge, ((), ()), {"pixel_values": torch.zeros(1)})  # type: ignore[arg-type]
    assert found.video is None
    assert notes[0].startswith("videos are left out, pictures are not: pixel_values_videos enter this model")
