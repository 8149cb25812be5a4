"""Tiny checkpoints of further families: LLaVA with the text models that users give it, and newer readers of documents.

They need nothing of their own in the package: the split and the lowering find by looking what they do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_qwen import image_inputs
from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, picture, save_tiny
from tests.zoo.entry import Entry, Example
from tests.zoo.models import (
    HIDDEN,
    IMAGE,
    VOCAB,
    Pixels,
    _build,
    _noise,
    _pictures,
    _sized,
    _text,
    _tiles,
    _vision,
    count_rows,
)
from vlmexport.model.load import VLM

_START = "<mark0>"
_SPECIAL = ("<|endoftext|>", "<|im_end|>", IMAGE, _START, *(f"<mark{i}>" for i in range(1, 7)))
# Rows and columns of patches: one picture, another aspect ratio, several of different sizes (and windows).
_GRIDS = (((8, 8),), ((4, 20),), ((12, 22), (10, 4)))
_MERGE = 4  # patches that are one token
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_TWO_SIZES = _tiles((((40, 80), 3),), (((80, 40), 3),), (((60, 60), 5), ((40, 80), 3)))
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_SAM: dict[str, Any] = {"hidden_size": 64, "output_channels": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                        "image_size": 128, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1],
                        "mlp_dim": 96}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2,
                                "patch_size": 14, "out_hidden_size": HIDDEN}  # fmt: skip
_VISION_MARKS = {"video_token_id": 4, "vision_start_token_id": 3, "vision_end_token_id": 5}
_IMAGE_MARKS = {"video_token_id": 4, "image_start_token_id": 3, "image_end_token_id": 5,
                "video_start_token_id": 6, "video_end_token_id": 7}  # fmt: skip


def _entry(model: Callable[[int], Any], examples: Callable[[VLM], tuple[Example, ...]]) -> Entry:
    """`model` builds the family from the image token's id."""

    def make(folder: Path) -> Path:
        tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
        return save_tiny(model(tokenizer.convert_tokens_to_ids(IMAGE)), tokenizer, dict(STATISTICS), folder, "", seed=0)

    return Entry(make, examples)


def _in_one_row(pixels: Callable[[], tuple[Pixels, ...]]) -> Callable[[VLM], tuple[Example, ...]]:
    """Prompts with the image tokens of all pictures in a row, as many as the model's features."""

    def examples(vlm: VLM) -> tuple[Example, ...]:
        token = vlm.facts.image_token_id
        given = pixels()
        return tuple({**_prompt([count_rows(vlm.model, token, p)], token, i), **p} for i, p in enumerate(given))

    return examples


def _gridded(patch: int, frames: int = 2, *, typed: bool = True) -> Callable[[VLM], tuple[Example, ...]]:
    """Prompts with pictures as patches and their grids; `typed` ones say which tokens are of pictures.

    A patch is `frames` times ``3 x patch x patch`` values.
    """

    def examples(vlm: VLM) -> tuple[Example, ...]:
        return tuple(_of_grids(grids, patch, frames, vlm.facts.image_token_id, typed) for grids in _GRIDS)

    return examples


def _of_grids(grids: tuple[tuple[int, int], ...], patch: int, frames: int, token: int, typed: bool) -> Example:
    made = [image_inputs(picture(c * patch, r * patch, seed=i), patch) for i, (r, c) in enumerate(grids)]
    pixels = torch.cat([one["pixel_values"] for one in made])
    if frames == 1:
        pixels = pixels.reshape(-1, 3, 2, patch * patch)[:, :, 0].flatten(1)
    prompt = _prompt([rows * columns // _MERGE for rows, columns in grids], token, len(grids))
    kinds = {"mm_token_type_ids": (prompt["input_ids"] == token).int()} if typed else {}
    return {**prompt, **kinds, "pixel_values": pixels, "image_grid_thw": torch.cat([o["image_grid_thw"] for o in made])}


def _prompt(counts: list[int], token: int, seed: int) -> Example:
    """Words, then so many image tokens and words for each picture."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(20, VOCAB - 60, (count,), generator=generator)

    start = torch.tensor([_SPECIAL.index(_START)])
    pieces = [words(3)]
    for count in counts:
        pieces += [start, torch.full((count,), token), words(4)]
    ids = torch.cat(pieces)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava(kind: str, **more: Any) -> Entry:
    """LLaVA with a text model of transformers' type `kind`."""

    def model(token: int) -> Any:
        vision = _vision("clip_vision_model", num_hidden_layers=2)
        return _build("Llava", text_config=_text(kind, **more), vision_config=vision, image_token_index=token)

    return _entry(model, _in_one_row(_pictures(2, 1, 3)))


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {**{name: value for name, value in _text("").items() if name != "model_type"}, "rope_parameters": rope}


def _llava_next_video(token: int) -> Any:
    """Its pictures; videos have a token and features of their own."""
    return _build(
        "LlavaNextVideo", text_config=_text("llama"), vision_config=_vision("clip_vision_model"),
        image_token_index=token, video_token_index=4, image_grid_pinpoints=_PINPOINTS,
    )  # fmt: skip


def _deepseek_vl_hybrid(token: int) -> Any:
    return _build(
        "DeepseekVLHybrid", text_config=_text("llama"), vision_config=_vision("siglip_vision_model"),
        high_res_vision_config={**_SAM, "model_type": "sam_vision_model"}, image_token_id=token,
    )  # fmt: skip


def _twice(*counts: int) -> Callable[[], tuple[Pixels, ...]]:
    """Every picture small, and large for a second tower."""
    return lambda: tuple(
        {"pixel_values": _noise(n, 3, 32, 32, seed=i), "high_res_pixel_values": _noise(n, 3, 128, 128, seed=9 + i)}
        for i, n in enumerate(counts)
    )


def _lighton_ocr(token: int) -> Any:
    vision = _vision("pixtral", image_size=64, head_dim=32)
    return _build("LightOnOcr", text_config=_text("qwen3"), vision_config=vision, image_token_id=token)


def _qianfan_ocr(token: int) -> Any:
    vision = _vision(image_size=[32, 32], patch_size=[8, 8])
    return _build("QianfanOCR", text_config=_text("qwen3"), vision_config=vision, image_token_id=token)


def _pp_chart2table(token: int) -> Any:
    return _build("GotOcr2", text_config=_text("qwen2"), vision_config=_SAM, image_token_index=token)


def _exaone4_5(token: int) -> Any:
    """Towers with fewer keys than queries."""
    vision = {**_QWEN_VISION, "fullatt_block_indexes": [1], "num_key_value_heads": 1}
    return _build(
        "Exaone4_5_", text_config=_text("exaone4"), vision_config=vision, image_token_id=token, video_token_id=4
    )


def _hyperclovax_vision_v2(token: int) -> Any:
    """Qwen2.5-VL's tower; positions of tokens are on one axis."""
    vision = {**_QWEN_VISION, "model_type": "qwen2_5_vl_vision", "fullatt_block_indexes": [1]}
    return _build(
        "HyperCLOVAXVisionV2", text_config=_text("hyperclovax"), vision_config=vision, image_token_id=token,
        video_token_id=4,
    )  # fmt: skip


def _glm(name: str, kind: str, token: int) -> Any:
    """Rotary over half of each head, on three axes; `kind` begins the types of its two configs."""
    text = {**_mrope(2, 3, 3, partial_rotary_factor=0.5), "model_type": f"{kind}_text", "pad_token_id": 0}
    vision = {**_QWEN_VISION, "image_size": 112, "spatial_merge_size": 2, "model_type": f"{kind}_vision"}
    return _build(name, text_config=text, vision_config=vision, image_token_id=token, **_IMAGE_MARKS)


def _cosmos3_omni(token: int) -> Any:
    """The reasoner alone, which is Qwen3-VL."""
    vision = {**_QWEN_VISION, "model_type": "qwen3_vl_vision", "patch_size": 16, "num_position_embeddings": 64,
              "deepstack_visual_indexes": [0, 2]}  # fmt: skip
    text = {**_mrope(6, 5, 5), "model_type": "qwen3_vl_text"}
    return _build("Cosmos3Omni", text_config=text, vision_config=vision, image_token_id=token, **_VISION_MARKS)


_WINDOW = {"sliding_window": 8, "layer_types": _LAYERS}
ENTRIES: dict[str, Entry] = {
    "llava_mistral": _llava("mistral", sliding_window=8),
    "llava_qwen2": _llava("qwen2"),
    "llava_qwen3": _llava("qwen3"),
    "llava_phi": _llava("phi", num_key_value_heads=4, partial_rotary_factor=0.5),
    "llava_phi3": _llava("phi3", pad_token_id=0),
    "llava_gemma": _llava("gemma"),
    "llava_gemma2": _llava("gemma2", query_pre_attn_scalar=32, **_WINDOW),
    "llava_gemma3": _llava("gemma3_text", query_pre_attn_scalar=32, **_WINDOW),
    "llava_stablelm": _llava("stablelm", partial_rotary_factor=0.25),
    "llava_olmo2": _llava("olmo2"),
    "llava_cohere2": _llava("cohere2", logit_scale=0.5, **_WINDOW),
    "llava_granite": _llava("granite", embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.2,
                            logits_scaling=2.0),
    "llava_glm4": _llava("glm4", pad_token_id=0),
    "llava_next_video": _entry(_llava_next_video, _in_one_row(_TWO_SIZES)),
    "deepseek_vl_hybrid": _entry(_deepseek_vl_hybrid, _in_one_row(_twice(2, 1, 3))),
    "lighton_ocr": _entry(_lighton_ocr, _in_one_row(_sized(((32, 48),), ((48, 32),), ((32, 48), (64, 32))))),
    "qianfan_ocr": _entry(_qianfan_ocr, _in_one_row(_pictures(2, 1, 3))),
    "pp_chart2table": _entry(_pp_chart2table, _in_one_row(_pictures(2, 1, 3, side=128))),
    "exaone4_5": _entry(_exaone4_5, _gridded(14, typed=False)),
    "hyperclovax_vision_v2": _entry(_hyperclovax_vision_v2, _gridded(14, typed=False)),
    "glm46v": _entry(lambda token: _glm("Glm46V", "glm4v", token), _gridded(14)),
    "glm_ocr": _entry(lambda token: _glm("GlmOcr", "glm_ocr", token), _gridded(14)),
    "cosmos3_omni": _entry(_cosmos3_omni, _gridded(16)),
}  # fmt: skip
