"""Tiny random checkpoints of the families with a GGUF form: model, tokenizer and image settings, from configs alone.

The image processors of most of these need torchvision, so ``preprocessor_config.json`` is written by hand, and
`pixel_inputs` makes the model's inputs from a picture that needs no resizing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import CHAT_TEMPLATE, CORPUS, randomise

HALF = [0.5, 0.5, 0.5]
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 448,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]


def make_checkpoint(family: str, folder: Path, seed: int = 0, **text: Any) -> Path:
    """Write a tiny checkpoint of `family` (a key of `FAMILIES`) to `folder`; `text` overrides its text config."""
    import torch

    special, builder = FAMILIES[family]
    tokenizer = make_tokenizer([*SPECIAL, *special])
    model, settings = builder(tokenizer, text)
    randomise(model, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def make_tokenizer(special: list[str]) -> Any:
    """A byte-level BPE tokenizer of 448 entries that knows the tokens `special`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=2048,
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture: neighbouring patches differ, and so do their channels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def normalised(image: Image.Image, settings: dict[str, Any]) -> Any:
    """The picture as ``[1, 3, height, width]``: divided by 255, less the mean, over the deviation."""
    import torch

    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    pixels = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())


def _text(model_type: str, text: dict[str, Any], **defaults: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**TEXT, **defaults, **text})


def _settings(**own: Any) -> dict[str, Any]:
    return {"image_mean": HALF, "image_std": HALF, "do_rescale": True, "do_normalize": True, **own}


def _idefics3(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _tiled(Idefics3Config, Idefics3ForConditionalGeneration, tokenizer, text)


def _smolvlm(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _tiled(SmolVLMConfig, SmolVLMForConditionalGeneration, tokenizer, text)


def _tiled(config_type: Any, model_type: Any, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    tied = bool(text.get("tie_word_embeddings", False))
    config = config_type(
        text_config=_text("llama", text),
        vision_config={**VISION, "hidden_act": "gelu_pytorch_tanh"},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
    )
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}
    return model_type(config), _settings(**tiles, resample=1)


def tiled_pixels(image: Image.Image, settings: dict[str, Any]) -> Any:
    """Idefics3's tiles and whole view of a picture, ``[1, tiles, 3, 32, 32]``, by its own image processor."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]


def stretched_pixels(image: Image.Image, settings: dict[str, Any]) -> Any:
    """The picture as SigLIP's own image processor makes it square, ``[1, 3, 32, 32]``."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]


def tile_batch(image: Image.Image, settings: dict[str, Any]) -> Any:
    """InternVL's tiles and its whole view, ``[tiles, 3, 32, 32]``, by the image processor that it uses."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]


def _llava(tower: str, tokenizer: Any, text: dict[str, Any], **own: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    kind = text.pop("text_type", "llama")
    config = LlavaConfig(
        text_config=_text(kind, text),
        vision_config=AutoConfig.for_model(tower, **{**VISION, **own.pop("encoder", {})}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        **own,
    )
    return LlavaForConditionalGeneration(config), _settings(size={"height": 32, "width": 32})


def _llava_siglip(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _llava("siglip_vision_model", tokenizer, text, vision_feature_select_strategy="full")


def _llava_clip(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _llava("clip_vision_model", tokenizer, text)


def _pixtral(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    own = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "encoder": {"hidden_act": "silu"}}
    text = {"text_type": "mistral", "sliding_window": None, "head_dim": 64, **text}
    model, _ = _llava("pixtral", tokenizer, text, **own)
    return model, _settings(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})


def _mistral3(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, Mistral3Config, Mistral3ForConditionalGeneration

    kind = text.pop("text_type", "mistral")
    config = Mistral3Config(
        text_config=_text(kind, text, sliding_window=None, head_dim=64, rms_norm_eps=1e-5),
        vision_config=AutoConfig.for_model("pixtral", **{**VISION, "hidden_act": "silu"}),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config), _settings(size={"longest_edge": 64}, patch_size=16)


def _ministral3(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    return _mistral3(tokenizer, {"text_type": "ministral3", "rope_parameters": rope, **text})


def _internvl(tokenizer: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration

    kind = text.pop("text_type", "qwen2")
    encoder = {**VISION, "image_size": (32, 32), "patch_size": (8, 8), "attention_bias": True}
    config = InternVLConfig(
        text_config=_text(kind, text),
        vision_config=AutoConfig.for_model("internvl_vision", **encoder),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    settings = _settings(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=12)
    return InternVLForConditionalGeneration(config), settings


_TILE_TOKENS = ["\n\n", "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
_PIXTRAL_TOKENS = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
FAMILIES: dict[str, tuple[list[str], Any]] = {
    "idefics3": (_TILE_TOKENS, _idefics3),
    "smolvlm": (_TILE_TOKENS, _smolvlm),
    "llava": ([], _llava_siglip),
    "llava_clip": ([], _llava_clip),
    "pixtral": (_PIXTRAL_TOKENS, _pixtral),
    "mistral3": (_PIXTRAL_TOKENS, _mistral3),
    "ministral3": (_PIXTRAL_TOKENS, _ministral3),
    "internvl": (["<img>", "</img>", "<IMG_CONTEXT>"], _internvl),
}
