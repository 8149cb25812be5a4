"""What processors that want torchvision make of a prompt, for tiny checkpoints; pictures are cut, not resized."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.families import tiny_lfm2
from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, normalised, save_tiny
from tests.zoo import models

PIXTRAL = ("<|endoftext|>", "<|im_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}[IMG]{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_PATCH, _MERGE, _EDGE = 8, 2, 64
_LFM2_IMAGES = {"do_image_splitting": False, "min_image_tokens": 4, "max_image_tokens": 16, "downsample_factor": 2,
                "encoder_patch_size": tiny_lfm2.PATCH}  # fmt: skip


class StandIn:
    """A processor of the checkpoint in `folder`: what Python code asks of one, and the call itself."""

    def __init__(self, folder: Path, prepare: Callable[[Sequence[Image.Image]], tuple[list[str], Any]]) -> None:
        import transformers

        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.chat_template = self.tokenizer.chat_template
        self.apply_chat_template = self.tokenizer.apply_chat_template
        settings = (Path(folder) / "preprocessor_config.json").read_text()
        self.image_processor = SimpleNamespace(to_json_string=lambda: settings)
        own = Path(folder) / "processor_config.json"
        self.settings: dict[str, Any] = json.loads(own.read_text()) if own.is_file() else {}
        self.image_token = self.settings.get("image_token", "<image>")
        for name in ("patch_size", "spatial_merge_size"):
            if name in self.settings:
                setattr(self, name, self.settings[name])
        self.prepare = prepare

    def to_json_string(self) -> str:
        return json.dumps(self.settings)

    def __call__(self, text: Any, images: Any = (), return_tensors: str = "pt", **more: Any) -> dict[str, Any]:
        (prompt,) = [text] if isinstance(text, str) else text
        pictures = [one for each in images for one in (each if isinstance(each, list) else [each])]
        pixels: dict[str, Any] = {}
        if pictures:
            places, pixels = self.prepare(pictures)
            first, *rest = prompt.split(self.image_token)
            prompt = first + "".join(place + piece for place, piece in zip(places, rest, strict=True))
        return {**self.tokenizer([prompt], return_tensors=return_tensors, **more), **pixels}


def use_stand_in(patch: pytest.MonkeyPatch, prepare: Callable[[Sequence[Image.Image]], tuple[list[str], Any]]) -> None:
    """Let transformers load a `StandIn` for every folder; `prepare` gives the text and the tensors of pictures."""
    import transformers

    load = staticmethod(lambda folder, **_: StandIn(folder, prepare))
    patch.setattr(transformers.AutoProcessor, "from_pretrained", load)


def make_mistral3(folder: Path) -> Path:
    """Pictures of any size, whose rows end with tokens of their own."""
    tokenizer = byte_level_tokenizer(PIXTRAL, models.VOCAB)
    images = {**STATISTICS, "size": {"longest_edge": _EDGE}, "patch_size": {"height": _PATCH, "width": _PATCH},
              "resample": 3, "image_processor_type": "PixtralImageProcessor"}  # fmt: skip
    save_tiny(models._mistral3(tokenizer.convert_tokens_to_ids("[IMG]")), tokenizer, images, folder, _TEMPLATE, 0)
    marks = dict(zip(("image_token", "image_break_token", "image_end_token"), PIXTRAL[2:], strict=True))
    settings = {"patch_size": _PATCH, "spatial_merge_size": _MERGE, **marks, "processor_class": "PixtralProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def mistral3_pictures(pictures: Sequence[Image.Image]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Pictures cut to whole tokens and padded to one size, with their own sizes."""
    unit = _PATCH * _MERGE
    small = [_whole(one, unit, _EDGE) for one in pictures]
    height, width = (max(p.size[axis] for p in small) for axis in (1, 0))
    pixels = torch.zeros(len(small), 3, height, width)
    places = []
    for place, one in enumerate(small):
        pixels[place, :, : one.height, : one.width] = torch.from_numpy(normalised(one))
        row = "[IMG]" * (one.width // unit)
        places.append("[IMG_BREAK]".join([row] * (one.height // unit)) + "[IMG_END]")
    return places, {"pixel_values": pixels, "image_sizes": torch.tensor([[p.height, p.width] for p in small])}


def _whole(image: Image.Image, unit: int, most: int) -> Image.Image:
    """The picture with sides of whole `unit` s, of `most` pixels at most: cut, or black beyond its edge."""
    return image.crop((0, 0, *(min(max(side // unit, 1) * unit, most) for side in image.size)))


def make_lfm2(folder: Path) -> Path:
    """Convolutions among its layers; pictures are not cut into tiles."""
    return tiny_lfm2.make_tiny_lfm2(folder, preprocessor=_LFM2_IMAGES)


def lfm2_pictures(pictures: Sequence[Image.Image]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Rows of patches, padded to as many as a picture may have."""
    most, size = 16 * tiny_lfm2.FACTOR**2, 3 * tiny_lfm2.PATCH**2
    pixels, mask = torch.zeros(len(pictures), most, size), torch.zeros(len(pictures), most, dtype=torch.int64)
    shapes, places = [], []
    for place, one in enumerate(pictures):
        made = tiny_lfm2.image_inputs(_whole(one, tiny_lfm2.PATCH * tiny_lfm2.FACTOR, 128))
        count = made["pixel_values"].shape[1]
        pixels[place, :count], mask[place, :count] = made["pixel_values"][0], 1
        shapes.append(made["spatial_shapes"])
        places.append("<|image_start|>" + "<image>" * (count // tiny_lfm2.FACTOR**2) + "<|image_end|>")
    return places, {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.cat(shapes)}
