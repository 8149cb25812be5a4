from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmexport.errors import BadInputError
from vlmexport.runtime import prompt
from vlmexport.runtime.prompt import PromptBuilder, load_image


def test_ids_are_those_of_transformers(tiny_idefics3: Path, pictures: list[Path]) -> None:
    builder = PromptBuilder(tiny_idefics3)
    ours = builder.build(pictures, "read the word.")
    images = [{"type": "image", "image": Image.open(p).convert("RGB")} for p in pictures]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": "read the word."}]}]
    theirs = builder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
    np.testing.assert_array_equal(ours.pixel_inputs["pixel_values"], theirs["pixel_values"].numpy())


def test_a_prompt_without_images_has_no_pixels(tiny_idefics3: Path) -> None:
    inputs = PromptBuilder(tiny_idefics3).build([], "hello")
    assert inputs.pixel_inputs == {}
    assert inputs.input_ids.shape[0] == 1


def test_a_flat_family_takes_several_images(tiny_llava: Path, pictures: list[Path]) -> None:
    inputs = PromptBuilder(tiny_llava).build(pictures, "compare")
    assert inputs.pixel_inputs["pixel_values"].shape[0] == 2


def test_without_a_chat_template_the_text_follows_the_image_tokens(tiny_llava: Path, pictures: list[Path]) -> None:
    builder = PromptBuilder(tiny_llava)
    seen: list[str] = []
    encode = builder.encode
    builder.encode = lambda text, images: seen.append(text) or encode(text, images)
    builder.processor.chat_template = None
    inputs = builder.build(pictures[:1], "compare")
    assert seen == [f"{builder.processor.image_token}compare"]
    assert "pixel_values" in inputs.pixel_inputs


def test_a_folder_without_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="the processor does not load"):
        PromptBuilder(tmp_path)


def test_exif_orientation_and_modes(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (20, 10)).save(path, exif=exif)
    image = load_image(path)
    assert (image.size, image.mode) == ((10, 20), "RGB")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.png"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"foreign\.png is not a readable image"):
        load_image(path)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp"])
def test_a_cut_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"cut.{kind}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(BadInputError, match=rf"cut\.{kind} is not a readable image"):
        load_image(path)


def test_missing_folder_and_huge_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match=r"no such image: .*gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(BadInputError, match="is not a readable image"):
        load_image(tmp_path)
    monkeypatch.setattr(prompt, "MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "big.png")
    with pytest.raises(BadInputError, match=r"big\.png has 10x10 pixels; the limit is 99"):
        load_image(tmp_path / "big.png")


def test_a_processor_that_needs_another_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def load(*_args: object, **_kwargs: object) -> None:
        raise ImportError("\nXProcessor requires the Torchvision library but it was not found\nand more lines\n")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    wanted = (
        r"does not load: XProcessor requires the Torchvision library but it was not found; pip install torchvision$"
    )
    with pytest.raises(BadInputError, match=wanted):
        PromptBuilder(tmp_path)
