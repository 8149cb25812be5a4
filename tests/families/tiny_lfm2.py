"""Tiny LFM2-VL checkpoints, and their inputs made from a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, normalised, save_tiny

SPECIAL = ("<|startoftext|>", "<|im_end|>", "<|im_start|>", "<|image_start|>", "<|image_end|>", "<image>",
           "<|img_thumbnail|>", *(f"<|img_row_{r}_col_{c}|>" for r in range(1, 4) for c in range(1, 4)))  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB, PATCH, FACTOR = 320, 16, 2


def make_tiny_lfm2(
    folder: Path,
    seed: int = 0,
    *,
    text: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint to `folder`; `text`, `preprocessor` and `config` change keys."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    tokenizer = byte_level_tokenizer(SPECIAL, VOCAB)
    settings: dict[str, Any] = {
        "text_config": {**_TEXT, **(text or {})},
        "vision_config": _VISION,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "downsample_factor": FACTOR,
        "projector_hidden_size": 192,
        **config,
    }
    images = {
        **STATISTICS,
        "resample": 2,
        "do_image_splitting": True,
        "min_image_tokens": 64,
        "max_image_tokens": 256,
        "tile_size": 512,
        "image_processor_type": "Lfm2VlImageProcessor",
        **(preprocessor or {}),
    }
    model = Lfm2VlForConditionalGeneration(Lfm2VlConfig(**settings))
    return save_tiny(model, tokenizer, images, folder, TEMPLATE, seed)


_TEXT: dict[str, Any] = {
    "model_type": "lfm2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "block_multiple_of": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_patches": 64,
    "vision_use_head": False,
    "patch_size": PATCH,
}


def image_inputs(image: Image.Image) -> dict[str, torch.Tensor]:
    """``pixel_values`` [1, patches, patch * patch * 3], their mask and ``spatial_shapes`` [1, 2] in patches."""
    pixels = normalised(image)
    rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    patches = pixels.reshape(3, rows, PATCH, columns, PATCH).transpose(1, 3, 2, 4, 0)
    return {
        "pixel_values": torch.from_numpy(patches.reshape(1, rows * columns, -1).copy()),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }
