"""Tiny checkpoints with three positions for each token, and prompts about pictures: no processor takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_qwen import image_inputs, make_tiny_qwen
from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, picture, save_tiny
from vlmexport.model.load import VLM, load_vlm

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
_GLM_TOKENS = ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>")
# Rows and columns of patches of each picture: one, another aspect ratio, several of different sizes (and windows).
SIZES = (((8, 8),), ((4, 20),), ((12, 22), (10, 4)))
Example = dict[str, torch.Tensor]


def make_qwen(family: str, folder: Path, **more: Any) -> Path:
    """Write a tiny checkpoint of `family` to `folder`."""
    return _make_glm4v(folder) if family == "glm4v" else make_tiny_qwen(family, folder, **more)


def load_qwen(family: str, folder: Path, **more: Any) -> VLM:
    """A tiny checkpoint of `family`, written to `folder` and loaded."""
    return load_vlm(str(make_qwen(family, folder, **more)))


def _make_glm4v(folder: Path) -> Path:
    """GLM-4.1V: rotary over half of each head, neighbours paired; positions of patches by bicubic interpolation."""
    import transformers

    tokenizer = byte_level_tokenizer(("<|endoftext|>", "<|im_end|>", *_GLM_TOKENS), 320)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in _GLM_TOKENS]
    names = ("image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, "rope_parameters": rope,
            "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "image_size": 112,
              "patch_size": 14, "out_hidden_size": 128, "spatial_merge_size": 2}  # fmt: skip
    config = transformers.Glm4vConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **dict(zip(names, ids, strict=True))
    )
    model = transformers.Glm4vForConditionalGeneration(config)
    return save_tiny(model, tokenizer, dict(STATISTICS), folder, "", 0)


def prompts(vlm: VLM, sizes: tuple[tuple[tuple[int, int], ...], ...] = SIZES) -> tuple[Example, ...]:
    """Inputs of the whole model: text, each example's pictures between their marks, text."""
    return tuple(prompt(vlm, pictures) for pictures in sizes)


def prompt(vlm: VLM, pictures: tuple[tuple[int, int], ...]) -> Example:
    """One of `prompts`; without pictures it is text alone."""
    config: Any = vlm.model.config
    patch = config.vision_config.patch_size
    pieces, made = [torch.arange(40, 43)], []
    for index, (rows, columns) in enumerate(pictures):
        made.append(image_inputs(picture(columns * patch, rows * patch, seed=index), patch))
        image = torch.full((rows * columns // 4,), config.image_token_id)
        kind = "vision" if hasattr(config, "vision_start_token_id") else "image"
        start, end = (torch.tensor([getattr(config, f"{kind}_{mark}_token_id")]) for mark in ("start", "end"))
        pieces += [start, image, end, torch.arange(60, 62)]
    ids = torch.cat([*pieces, torch.arange(80, 85)])[None]
    pixels = {name: torch.cat([one[name] for one in made]) for name in (made[0] if made else ())}
    kinds = (ids == config.image_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **pixels}
