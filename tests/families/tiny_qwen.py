"""Tiny Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE checkpoints, and their inputs made from a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, normalised, save_tiny

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
HIDDEN, VOCAB = 128, 320


def make_tiny_qwen(
    family: str,
    folder: Path,
    seed: int = 0,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of `family` to `folder`; `text` and `vision` change keys of the two configs."""
    import transformers

    stem = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
    tokenizer = byte_level_tokenizer(SPECIAL, VOCAB)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    config = getattr(transformers, f"{stem[family]}Config")(
        text_config={**_text(family), **(text or {})},
        vision_config={**_vision(family), **(vision or {})},
        tie_word_embeddings=False,
        **ids,
    )
    model = getattr(transformers, f"{stem[family]}ForConditionalGeneration")(config)
    patch = config.vision_config.patch_size
    preprocessor = {
        **STATISTICS,
        "size": {"shortest_edge": 3136, "longest_edge": 1003520},
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    return save_tiny(model, tokenizer, preprocessor, folder, TEMPLATE, seed)


_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _text(family: str) -> dict[str, Any]:
    sections = [4, 6, 6] if family.startswith("qwen2") else [6, 5, 5]
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
    }
    if family.startswith("qwen3"):
        sizes["head_dim"] = 32
    if family == "qwen3_vl_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return sizes


def _vision(family: str) -> dict[str, Any]:
    common: dict[str, Any] = {"depth": 4, "num_heads": 2, "patch_size": 14}
    if family == "qwen2_vl":
        return {**common, "embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2}
    common |= {"hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 96}
    if family == "qwen2_5_vl":
        return {**common, "fullatt_block_indexes": [1, 3]}
    deepstack = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64, "patch_size": 16}
    return {**common, **deepstack}


def image_inputs(image: Image.Image, patch: int, merge: int = 2) -> dict[str, torch.Tensor]:
    """``pixel_values`` [patches, 3 * 2 * patch * patch] and ``image_grid_thw`` [1, 3] of a picture of fitting size."""
    pixels = normalised(image)
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    cut = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    patches = cut.transpose(1, 4, 2, 5, 0, 3, 6)  # [row, column, row in merge, column in merge, 3, patch, patch]
    twice = np.broadcast_to(patches[:, :, :, :, :, None], (*patches.shape[:5], 2, patch, patch))
    return {
        "pixel_values": torch.from_numpy(twice.reshape(rows * columns, -1).copy()),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
