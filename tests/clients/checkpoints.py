"""Tiny checkpoints with processors that Python and a JavaScript client both load, one for each family of the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from tests.clients import stand_in
from tests.clients.stand_in import use_stand_in
from tests.families.tiny_qwen import TEMPLATE, make_tiny_qwen
from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.tiny import make_tiny
from tests.zoo import gemma, more

Sizes = tuple[tuple[int, int], ...]
Kinds = Literal["", "token_type_ids", "mm_token_type_ids"]


@dataclass(frozen=True)
class WebCase:
    """One family: its checkpoint, and the sizes (width, height) of each prompt's pictures.

    `processor` names the class where transformers' own way to it wants torchvision for videos, `pictures` stands for
    one that wants it for pictures (tests/clients/stand_in.py). `kinds` is the input
    that tells PyTorch's model the kinds of tokens. `images_first`: its processor in the client takes the pictures
    before the text. `plain`: it has no chat template, and the client's processor adds the image tokens.
    """

    make: Callable[[Path], Path]
    sizes: tuple[Sizes, ...]
    processor: str = ""
    pictures: Callable[[Sequence[Image.Image]], tuple[list[str], Any]] | None = None
    kinds: Kinds = ""
    images_first: bool = False
    plain: bool = False


def use_case(patch: pytest.MonkeyPatch, case: WebCase) -> None:
    """Let transformers load the processor of `case` without torchvision."""
    if case.pictures is not None:
        use_stand_in(patch, case.pictures)
    elif case.processor:
        _compose_processor(patch, case.processor)


def _compose_processor(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let transformers compose the processor `name` of an image processor and a tokenizer, without one for videos."""
    import transformers

    kind = getattr(transformers, name)

    def compose(folder: Any, **_: Any) -> Any:
        image = transformers.AutoImageProcessor.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return kind(image, tokenizer, None, chat_template=tokenizer.chat_template)

    patch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
    patch.setattr(transformers.AutoProcessor, "from_pretrained", staticmethod(compose))


def _paligemma(kind: str) -> WebCase:
    def make(folder: Path) -> Path:
        import transformers
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        gemma.make_gemma(kind, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        images = SiglipImageProcessorPil(size={"height": gemma.SIDE, "width": gemma.SIDE})
        images.image_seq_length = gemma.ROWS
        transformers.PaliGemmaProcessor(images, tokenizer).save_pretrained(folder)
        return folder

    return WebCase(make, _SMALL, kinds="token_type_ids", images_first=True, plain=True)


def _glm_ocr(folder: Path) -> Path:
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", _GLM_PICTURE)
    tokenizer = byte_level_tokenizer(("<|endoftext|>", "<|im_end|>", *_GLM_TOKENS), more.VOCAB)
    model = more._glm("GlmOcr", "glm_ocr", tokenizer.convert_tokens_to_ids("<|image|>"))
    return save_tiny(model, tokenizer, _GLM_IMAGES, folder, template, 0)


def _qwen(family: str) -> WebCase:
    return WebCase(
        lambda folder: make_tiny_qwen(family, folder), _PATCHED, "Qwen2_5_VLProcessor", kinds="mm_token_type_ids"
    )


_GLM_TOKENS = ("<|image|>", "<|begin_of_image|>", "<|video|>", "<|end_of_image|>", "<|begin_of_video|>",
               "<|end_of_video|>")  # fmt: skip
_GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM_IMAGES: dict[str, Any] = {
    **STATISTICS, "size": {"shortest_edge": 6272, "longest_edge": 2007040}, "patch_size": 14, "merge_size": 2,
    "temporal_patch_size": 2, "image_processor_type": "Glm46VImageProcessor",
}  # fmt: skip
# The first picture is of the model's own size: the client resizes others with another filter.
_SMALL: tuple[Sizes, ...] = (((32, 32),), ((64, 40),), ((32, 32), (40, 64)))
_PATCHED: tuple[Sizes, ...] = (((112, 84),), ((280, 56),), ((140, 84), (56, 112)), ())
_WHOLE: tuple[Sizes, ...] = (((32, 48),), ((64, 32),), ((48, 32), (48, 32)), ())
_TOKENS: tuple[Sizes, ...] = (((64, 96),), ((128, 32),), ((96, 64), (64, 64)), ())
CASES = {
    "idefics3": WebCase(lambda folder: make_tiny("idefics3", folder), (*_SMALL, ())),
    "llava": WebCase(lambda folder: make_tiny("llava", folder), (*_SMALL, ()), images_first=True),
    "paligemma": _paligemma("paligemma"),
    "paligemma2": _paligemma("paligemma2"),
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "glm_ocr": WebCase(_glm_ocr, _PATCHED, "Glm46VProcessor", kinds="mm_token_type_ids"),
    "mistral3": WebCase(stand_in.make_mistral3, _WHOLE, pictures=stand_in.mistral3_pictures, images_first=True),
    "lfm2_vl": WebCase(stand_in.make_lfm2, _TOKENS, pictures=stand_in.lfm2_pictures, images_first=True),
}
# The families whose model type is another's.
MODEL_TYPES = {"paligemma2": "paligemma"}
