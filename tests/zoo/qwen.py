"""Prompts about pictures for the tiny Qwen-VL checkpoints: no processor takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_qwen import image_inputs, make_tiny_qwen
from tests.families.tiny_text import picture
from vlmexport.model.load import VLM, load_vlm

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Rows and columns of patches of each picture: one, another aspect ratio, several of different sizes (and windows).
SIZES = (((8, 8),), ((4, 20),), ((12, 22), (10, 4)))
Example = dict[str, torch.Tensor]


def load_qwen(family: str, folder: Path, **more: Any) -> VLM:
    """A tiny checkpoint of `family`, written to `folder` and loaded."""
    return load_vlm(str(make_tiny_qwen(family, folder, **more)))


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
        marks = (torch.tensor([token]) for token in (config.vision_start_token_id, config.vision_end_token_id))
        pieces += [next(marks), image, next(marks), torch.arange(60, 62)]
    ids = torch.cat([*pieces, torch.arange(80, 85)])[None]
    pixels = {name: torch.cat([one[name] for one in made]) for name in (made[0] if made else ())}
    kinds = (ids == config.image_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **pixels}
