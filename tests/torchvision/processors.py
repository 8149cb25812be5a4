"""Tiny checkpoints of the zoo with processors of their families' own classes, which need torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.families.tiny_text import byte_level_tokenizer, save_tiny
from tests.zoo import models, ple, qwen

IMAGE, SIDE, VOCAB = "<image>", 32, models.VOCAB
Processor = Callable[[Any, str], Any]


def template(image: str) -> str:
    """A chat template with `image` for each picture."""
    return (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


@dataclass(frozen=True)
class Real:
    """A model of `models.ZOO` with its processor.

    `processor` makes it from the tokenizer and the chat template; `named` are the tokens that it asks the tokenizer
    for, `tokens` further special ones.
    """

    processor: Processor
    named: dict[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    image: str = IMAGE


def make_zoo(family: str, folder: Path) -> Path:
    """Write the checkpoint of `family` (a key of `ZOO`) and its processor to `folder`."""
    real = ZOO[family]
    special = dict.fromkeys(("<|endoftext|>", "<|im_end|>", IMAGE, *real.named.values(), *real.tokens))
    tokenizer = byte_level_tokenizer(tuple(special), VOCAB, **real.named)
    model = models.ZOO[family].model(tokenizer.convert_tokens_to_ids(IMAGE))
    save_tiny(model, tokenizer, {}, folder, template(real.image), 0)
    return _with(folder, real.processor(tokenizer, template(real.image)))


def _with(folder: Path, processor: Any) -> Path:
    (folder / "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)
    return folder


def _square(**more: Any) -> dict[str, Any]:
    return {"size": {"height": SIDE, "width": SIDE}, **more}


def _cohere2_vision(tokenizer: Any, words: str) -> Any:
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    pixels = Cohere2VisionImageProcessor(**_square(patch_size=2, max_patches=4))
    return Cohere2VisionProcessor(pixels, tokenizer, chat_template=words)


def _internvl(tokenizer: Any, words: str) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    pixels = GotOcr2ImageProcessor(**_square(crop_to_patches=True, max_patches=4))
    video = InternVLVideoProcessor(**_square())
    return InternVLProcessor(pixels, tokenizer, video, image_seq_length=4, chat_template=words)


def _lfm2_vl(tokenizer: Any, words: str) -> Any:
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    tiles = {"tile_size": SIDE, "encoder_patch_size": 8, "min_image_tokens": 2, "max_image_tokens": 4, "max_tiles": 4}
    return Lfm2VlProcessor(Lfm2VlImageProcessor(**_square(**tiles)), tokenizer, chat_template=words)


def _llava_onevision(tokenizer: Any, words: str) -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    pixels = LlavaOnevisionImageProcessor(**_square(image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]))
    video = LlavaOnevisionVideoProcessor(**_square())
    how = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "chat_template": words}
    return LlavaOnevisionProcessor(pixels, tokenizer, video, **how)


def _mistral3(tokenizer: Any, words: str) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    pixels = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    marks = {"image_token": IMAGE, "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return PixtralProcessor(pixels, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=words, **marks)


def _smolvlm(tokenizer: Any, words: str) -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tiles = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    video = SmolVLMVideoProcessor(max_image_size={"longest_edge": SIDE})
    return SmolVLMProcessor(SmolVLMImageProcessor(**tiles), tokenizer, video, image_seq_len=4, chat_template=words)


def _video_llava(tokenizer: Any, words: str) -> Any:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    pixels, video = VideoLlavaImageProcessor(**crop), VideoLlavaVideoProcessor(**crop)
    return VideoLlavaProcessor(pixels, video, tokenizer, patch_size=8, chat_template=words)


_TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_LFM_TILES = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
ZOO: dict[str, Real] = {
    "cohere2_vision": Real(
        _cohere2_vision,
        {"image_token": IMAGE, "boi_token": "<boi>", "eoi_token": "<eoi>", "img_line_break_token": "<break>"},
    ),
    "internvl": Real(
        _internvl,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": IMAGE,
            "video_token": "<video>",
        },
    ),
    "lfm2_vl": Real(_lfm2_vl, tokens=("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *_LFM_TILES)),
    "llava_onevision": Real(_llava_onevision, tokens=("<video>",)),
    "mistral3": Real(_mistral3, tokens=("[IMG_BREAK]", "[IMG_END]")),
    "smolvlm": Real(_smolvlm, tokens=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES)),
    "video_llava": Real(_video_llava, tokens=("<video>",)),
}


def make_glm4v(folder: Path) -> Path:
    """GLM-4.1V."""
    from transformers import AutoTokenizer, Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    qwen.make_qwen("glm4v", folder)
    words = template("<|begin_of_image|><|image|><|end_of_image|>")
    pixels = Glm4vImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112 * 2})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return _with(folder, Glm4vProcessor(pixels, tokenizer, Glm4vVideoProcessor(), chat_template=words))


def make_gemma4(folder: Path) -> Path:
    """Gemma 4: patches, padded to as many as 70 tokens have."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    names = ("image", "boi", "eoi", "audio", "boa", "eoa")
    named = {f"{name}_token": f"<{name}>" for name in names}
    special = ("<|endoftext|>", "<|im_end|>", *named.values(), "<|video|>")
    tokenizer = byte_level_tokenizer(special, ple.VOCAB, **named)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in names}
    config = Gemma4Config(
        text_config=ple._TEXT,
        vision_config=ple._VISION | {"position_embedding_size": 280},
        audio_config=None,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        eoa_token_index=ids.pop("eoa"),
        **{f"{name}_token_id": ids[name] for name in ids},
    )
    model = Gemma4ForConditionalGeneration(config)
    ple._fill_buffers(model)
    save_tiny(model, tokenizer, {}, folder, template("<image>"), 0)
    patches = {"patch_size": ple.PATCH, "pooling_kernel_size": ple.POOL}
    pixels = Gemma4ImageProcessor(max_soft_tokens=70, **patches)
    sounds, video = Gemma4AudioFeatureExtractor(), Gemma4VideoProcessor(max_soft_tokens=70, **patches)
    words = {"image_seq_length": 70, "chat_template": template("<image>")}
    return _with(folder, Gemma4Processor(sounds, pixels, tokenizer, video, **words))


OTHERS: dict[str, Callable[[Path], Path]] = {"gemma4": make_gemma4, "glm4v": make_glm4v}
