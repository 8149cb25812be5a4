from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.split import examples
from vlmexport.split.examples import draw_picture, load_processor, processor_examples, prompt_text


@pytest.mark.parametrize("family", ["tiny_idefics3", "tiny_llava", "tiny_vipllava"])
def test_examples_run_through_the_model_and_differ(family: str, request: pytest.FixtureRequest) -> None:
    vlm = load_vlm(str(request.getfixturevalue(family)))
    one, other, two = processor_examples(vlm)
    for example in (one, other, two):
        with torch.no_grad():
            assert vlm.model(**example).logits.isfinite().all()
    lengths = {e["input_ids"].shape[1] for e in (one, two)}
    assert len(lengths) == 2
    assert two["pixel_values"].numel() == 2 * one["pixel_values"].numel()
    assert not torch.equal(one["pixel_values"][0, 0], other["pixel_values"][0, 0])


def test_tiles_vary_with_the_aspect_ratio(tiny_idefics3: Path) -> None:
    one, other, two = processor_examples(load_vlm(str(tiny_idefics3)))
    assert [e["pixel_values"].shape[1] for e in (one, other, two)] == [3, 5, 6]


def test_the_second_picture_has_another_number_of_pixels_where_it_can(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture on its side has other shapes and as many features: nothing is seen to depend on its size."""

    def unresized(_vlm: Any, _processor: Any, images: Any, _prompt: str) -> dict[str, torch.Tensor]:
        width, height = (max(picture.size[axis] for picture in images) for axis in (0, 1))
        return {"input_ids": torch.zeros(1, 3), "pixel_values": torch.zeros(len(images), 3, height, width)}

    monkeypatch.setattr(examples, "example_inputs", unresized)
    one, other, _ = processor_examples(load_vlm(str(tiny_llava)))
    assert other["pixel_values"].numel() > one["pixel_values"].numel()


def test_pictures_are_reproducible_and_not_black() -> None:
    picture = draw_picture(48, 32, seed=3)
    assert picture.size == (48, 32)
    assert picture.tobytes() == draw_picture(48, 32, seed=3).tobytes()
    assert min(picture.tobytes()) > 0


def test_image_token_stands_for_the_picture_without_a_template(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    processor = load_processor(vlm)
    processor.chat_template = None
    assert prompt_text(vlm, processor, 2, "hi") == "<image><image>hi"


class _Failing(VLM):
    error: Exception

    def processor(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Foo requires the Torchvision library: torchvision not found"), "pip install torchvision"),
        (OSError("no such\nfile"), "no such file"),
    ],
)
def test_a_processor_that_cannot_be_loaded_is_one_clear_line(tiny_llava: Path, error: Exception, message: str) -> None:
    vlm = load_vlm(str(tiny_llava))
    failing = _Failing(**{f.name: getattr(vlm, f.name) for f in dataclasses.fields(vlm)})
    object.__setattr__(failing, "error", error)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        processor_examples(failing)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_processor_is_refused(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    tokenizer_only = _Tokenizer(**{f.name: getattr(vlm, f.name) for f in dataclasses.fields(vlm)})
    with pytest.raises(UnsupportedModelError, match=r"processor_config\.json"):
        load_processor(tokenizer_only)


class _Tokenizer(VLM):
    def processor(self) -> Any:
        return super().processor().tokenizer
