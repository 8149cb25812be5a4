"""Tiny checkpoints whose prompts hold blocks of tokens that see each other, with inputs made by hand.

Windows are shorter than the blocks, and layers of one kind do not stand together, as in the real models' first layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny

IMAGE = "<image>"
HIDDEN, VOCAB, SIDE, ROWS, WINDOW = 128, 320, 32, 16, 12
_SPECIAL = ("<|endoftext|>", "<|im_end|>", IMAGE)
Example = dict[str, torch.Tensor]

FAMILIES = ("gemma3", "paligemma", "paligemma2")
_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


def make_gemma(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of one of `FAMILIES` to `folder`, without a processor."""
    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    model = _gemma3(token) if family == "gemma3" else _paligemma(token, family)
    save_tiny(model, tokenizer, dict(STATISTICS), folder, "", seed)
    if family != "gemma3":
        _count_norms_from_zero(model)
        model.save_pretrained(folder)
    return folder


def gemma_examples(family: str, image_token: int) -> tuple[Example, ...]:
    """One picture, one picture and a longer text, two pictures; as the processors make them."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> torch.Tensor:
        return torch.randint(10, VOCAB - 60, (1, count), generator=generator)

    image = torch.full((1, ROWS), image_token)
    prompts = ([words(3), image, words(5)], [words(2), image, words(19)], [words(3), image, words(2), image, words(6)])
    made = []
    for pieces, pictures in zip(prompts, (1, 1, 2), strict=True):
        ids = torch.cat(pieces, dim=1)
        types = (ids == image_token).long() if family == "gemma3" else torch.zeros_like(ids)
        pixels = torch.randn(pictures, 3, SIDE, SIDE, generator=generator)
        made.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "pixel_values": pixels}
        )
    return tuple(made)


_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
}
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "vision_use_head": False,
}


def _gemma3(token: int) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    rotary = {
        "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    text = {**_TEXT, "query_pre_attn_scalar": 32, "sliding_window": WINDOW, "layer_types": _LAYERS}
    config = Gemma3Config(
        text_config={**text, "rope_parameters": rotary},
        vision_config=_VISION,
        mm_tokens_per_image=ROWS,
        image_token_index=token,
    )
    return Gemma3ForConditionalGeneration(config)


def _paligemma(token: int, family: str) -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = {**_TEXT, "model_type": "gemma"}
    if family == "paligemma2":
        capped = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32}
        text |= {"model_type": "gemma2", "sliding_window": WINDOW, "layer_types": _LAYERS, **capped}
    config = PaliGemmaConfig(text_config=text, vision_config=_VISION, image_token_index=token, projection_dim=HIDDEN)
    return PaliGemmaForConditionalGeneration(config)


def _count_norms_from_zero(model: nn.Module) -> None:
    """Gemma's norms multiply by ``1 + w``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") and "language_model" in name:
                parameter.sub_(1)
