"""Tiny Gemma 3 checkpoints, and their inputs made from a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, normalised, save_tiny

SPECIAL = ("<bos>", "<end_of_turn>", "<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SIDE, TOKENS, VOCAB = 64, 16, 320


def make_tiny_gemma3(
    folder: Path, seed: int = 0, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint to `folder`; `text` and `vision` change keys of the two configs."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = byte_level_tokenizer(SPECIAL, VOCAB, **names)
    index = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config={**_TEXT, "bos_token_id": index("<bos>"), **(text or {})},
        vision_config={**_VISION, **(vision or {})},
        mm_tokens_per_image=TOKENS,
        boi_token_index=index("<start_of_image>"),
        eoi_token_index=index("<end_of_image>"),
        image_token_index=index("<image_soft_token>"),
    )
    preprocessor = {
        **STATISTICS,
        "size": {"height": SIDE, "width": SIDE},
        "image_seq_length": TOKENS,
        "image_processor_type": "Gemma3ImageProcessor",
    }
    save_tiny(Gemma3ForConditionalGeneration(config), tokenizer, preprocessor, folder, TEMPLATE, seed)
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def image_inputs(image: Image.Image) -> dict[str, torch.Tensor]:
    """``pixel_values`` [1, 3, side, side] of a picture of the tower's size."""
    return {"pixel_values": torch.from_numpy(normalised(image))[None]}
