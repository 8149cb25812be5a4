"""Tiny checkpoints of newer families: readers of documents, and models that also hear.

They need nothing of their own in the package: the split and the lowering find by looking what they do, or say what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from tests.zoo.entry import Entry, Example
from tests.zoo.models import HIDDEN, Pixels, _build, _noise, _pictures, _qformer, _text, _tiles, _vision
from tests.zoo.more import (
    _GRIDS,
    _IMAGE_MARKS,
    _PINPOINTS,
    _QWEN_VISION,
    _VISION_MARKS,
    _entry,
    _gridded,
    _in_one_row,
    _mrope,
    _of_grids,
    _prompt,
)
from vlmexport.model.load import VLM

_TWO = {"num_hidden_layers": 2}
_PLAIN: dict[str, Any] = {name: value for name, value in _text("").items() if name != "model_type"} | _TWO
_QWEN: dict[str, Any] = {**_QWEN_VISION, "depth": 2}
_PATCH_16: dict[str, Any] = {**_QWEN, "patch_size": 16, "num_position_embeddings": 64}
_DEEP: dict[str, Any] = {**_PATCH_16, "deepstack_visual_indexes": [0, 1]}
_LINEAR: dict[str, Any] = {
    **_mrope(3, 3, 2, partial_rotary_factor=0.5), **_TWO, "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def _granite_docling(token: int) -> Any:
    """Tiles that are pixel-shuffled; what two early layers add, and multipliers of embeddings and logits.

    The finer route of its connector is there, and asked for by an input that no example has.
    """
    text = {**_PLAIN, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
            "logits_scaling": 4.0, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = _vision(out_hidden_size=HIDDEN, scale_factor=2, deepstack_visual_indexes=[0, 1], **_TWO)
    return _build("GraniteDocling", text_config=text, vision_config=vision, image_token_id=token, pad_token_id=0)


def _tiled(*counts: int) -> Callable[[], tuple[Pixels, ...]]:
    """Examples of so many tiles, none of them padding."""
    return lambda: tuple(
        {"pixel_values": _noise(1, n, 3, 32, 32, seed=i), "pixel_attention_mask": torch.ones(1, n, dtype=torch.bool)}
        for i, n in enumerate(counts)
    )


def _granite4_vision(token: int) -> Any:
    """Features for several layers, and none for the embeddings."""
    return _build(
        "Granite4Vision", text_config={**_PLAIN, "pad_token_id": 0}, image_token_index=token,
        vision_config=_vision("siglip_vision_model", num_hidden_layers=4), image_grid_pinpoints=_PINPOINTS,
        downsample_rate="2/4", deepstack_layer_map=[[-4, 0], [-2, 1]], spatial_target_layers=[2],
        spatial_vision_layer=-1, vision_feature_select_strategy="full",
        qformer_config={**_qformer(), "model_type": "blip_2_qformer"},
    )  # fmt: skip


def _granite4_prompts(vlm: VLM) -> tuple[Example, ...]:
    """Prompts with as many image tokens as there are rows for each layer."""
    made, model = [], cast(Any, vlm.model)
    pixels = _tiles((((40, 80), 3),), (((80, 40), 3),), (((60, 60), 5), ((40, 80), 3)))()
    for index, given in enumerate(pixels):
        with torch.no_grad():
            _, rows = model.get_image_features(**given).deepstack_features[0]
        made.append({**_prompt([len(picture) for picture in rows], vlm.facts.image_token_id, index), **given})
    return tuple(made)


def _paddleocr_vl(token: int) -> Any:
    vision = _vision(patch_size=14, image_size=112, **_TWO)
    text = {**_mrope(4, 6, 6), **_TWO, "pad_token_id": 0}
    return _build("PaddleOCRVL", text_config=text, vision_config=vision, image_token_id=token, **_VISION_MARKS)


def _unflattened(patch: int) -> Callable[[VLM], tuple[Example, ...]]:
    """Prompts with pictures as patches ``[patches, 3, patch, patch]`` and their grids."""

    def examples(vlm: VLM) -> tuple[Example, ...]:
        made = _gridded(patch, 1)(vlm)
        return tuple({**e, "pixel_values": e["pixel_values"].reshape(-1, 3, patch, patch)} for e in made)

    return examples


def _hunyuan_vl(token: int) -> Any:
    """Positions on four axes; rows that begin, end and break a picture."""
    vision = _vision(**_TWO, out_hidden_size=HIDDEN, patch_size=16, temporal_patch_size=1, max_image_size=128)
    marks = {"im_start_id": 3, "im_end_id": 5, "im_newline_id": 6}
    return _build(
        "HunYuanVL", text_config={**_mrope(4, 4, 4, 4), **_TWO}, vision_config=vision, image_token_id=token, **marks
    )


def _broken_rows(vlm: VLM) -> tuple[Example, ...]:
    """Prompts with a token behind each row of a picture's tokens, and two around them."""
    made = []
    for index, grids in enumerate(_GRIDS):
        given = _of_grids(grids, 16, 1, vlm.facts.image_token_id, typed=False)
        counts = [rows // 2 * (columns // 2 + 1) + 2 for rows, columns in grids]
        prompt = _prompt(counts, vlm.facts.image_token_id, index)
        kinds = (prompt["input_ids"] == vlm.facts.image_token_id).int()
        made.append({**given, **prompt, "mm_token_type_ids": kinds})
    return tuple(made)


def _video_llama_3(token: int) -> Any:
    return _build(
        "VideoLlama3", text_config=_text("qwen2", **_TWO), vision_config=_vision(patch_size=14, **_TWO),
        image_token_id=token, video_token_id=4,
    )  # fmt: skip


def _merged(examples: Callable[[VLM], tuple[Example, ...]], merge: int) -> Callable[[VLM], tuple[Example, ...]]:
    """`examples` that say of each picture that `merge` x `merge` of its patches are one token."""

    def with_sizes(vlm: VLM) -> tuple[Example, ...]:
        made = examples(vlm)
        return tuple({**e, "image_merge_sizes": torch.full((len(e["image_grid_thw"]),), merge)} for e in made)

    return with_sizes


def _minicpmv(name: str, token: int, **more: Any) -> Any:
    """Patches beside each other; a tower that merges windows in its middle, before a projector that merges again."""
    text, vision = {**_LINEAR, "model_type": "qwen3_5_text"}, _vision(num_hidden_layers=3)
    return _build(
        name, text_config=text, vision_config=vision, insert_layer_id=1, image_token_id=token, video_token_id=4,
        **more,
    )  # fmt: skip


def _in_strips(vlm: VLM) -> tuple[Example, ...]:
    """Prompts with the patches of all pictures in one row ``[1, 3, patch, patch * patches]``."""
    made = []
    merged = {"16x": 16, "4x": 4}[cast(Any, vlm.config).downsample_mode]
    for index, sizes in enumerate((((4, 8),), ((8, 4),), ((8, 8), (4, 12)))):
        prompt = _prompt([rows * columns // merged for rows, columns in sizes], vlm.facts.image_token_id, index)
        patches = sum(rows * columns for rows, columns in sizes)
        strip = _noise(1, 3, 8, 8 * patches, seed=index)
        made.append({**prompt, "pixel_values": strip, "target_sizes": torch.tensor(sizes)})
    return tuple(made)


def _on_canvas(vlm: VLM) -> tuple[Example, ...]:
    """`_in_strips`, where the kinds of tokens say which are of pictures."""
    token = vlm.facts.image_token_id
    return tuple({**e, "mm_token_type_ids": (e["input_ids"] == token).int()} for e in _in_strips(vlm))


def _ernie4_5_vl_moe(token: int) -> Any:
    """Experts of text and experts of pictures."""
    text = {**_mrope(4, 4, 8), "moe_intermediate_size": [96, 48], "moe_k": 2, "moe_num_experts": 5,
            "moe_num_shared_experts": 1}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 14}
    return _build("Ernie4_5_VLMoe", text_config=text, vision_config=vision, image_token_id=token, **_IMAGE_MARKS)


def _with_kinds(vlm: VLM) -> tuple[Example, ...]:
    """Prompts that say of each token which experts it is for."""
    made = _gridded(14, 1)(vlm)
    return tuple({**example, "moe_mm_token_type_ids": example["mm_token_type_ids"]} for example in made)


def _qwen3_5_moe(token: int) -> Any:
    """Linear attention and experts."""
    text = {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 96}
    return _build("Qwen3_5Moe", text_config=text, vision_config=_PATCH_16, image_token_id=token, **_VISION_MARKS)


def _audio(**more: Any) -> dict[str, Any]:
    return {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
            "output_dim": HIDDEN, "max_source_positions": 64, "n_window": 8, "num_mel_bins": 16, **more}  # fmt: skip


def _qwen2_5_omni_thinker(token: int) -> Any:
    """Sees and hears; what hears is left out."""
    vision = {**_QWEN, "fullatt_block_indexes": [1]}
    return _build(
        "Qwen2_5OmniThinker", text_config={**_mrope(4, 6, 6), **_TWO}, vision_config=vision, audio_config=_audio(),
        image_token_index=token, video_token_index=4, audio_token_index=6,
        audio_start_token_id=7, audio_end_token_id=8, vision_start_token_id=3,
    )  # fmt: skip


def _qwen3_omni_moe_thinker(token: int) -> Any:
    return _build(
        "Qwen3OmniMoeThinker", text_config={**_mrope(6, 5, 5), **_TWO, **_EXPERTS}, vision_config=_DEEP,
        audio_config=_audio(downsample_hidden_size=16), image_token_id=token, video_token_id=4, audio_token_id=6,
        audio_start_token_id=7, vision_start_token_id=3, vision_end_token_id=5,
    )  # fmt: skip


def _cosmos3_edge(token: int) -> Any:
    vision = _vision(num_patches=16, patch_size=16, spatial_merge_size=2, **_TWO)
    return _build(
        "Cosmos3Edge", text_config={**_mrope(4, 6, 6), **_TWO}, vision_config=vision, projector_hidden_size=96,
        image_token_id=token, **_VISION_MARKS,
    )  # fmt: skip


def _cohere_compass(token: int) -> Any:
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
            "full_attention": None}  # fmt: skip
    layers = ["sliding_attention", "full_attention"]
    text = {**_PLAIN, "rope_parameters": rope, "sliding_window": 8, "logit_scale": 0.5, "layer_types": layers}
    return _build("CohereCompass", text_config=text, vision_config=_DEEP, image_token_id=token, **_VISION_MARKS)


_SAM_TWO: dict[str, Any] = {
    "hidden_size": 64, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128,
    "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 96, "downsample_channels": [48, 64],
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    **{name: value for name, value in _PLAIN.items() if name != "head_dim"}, "n_routed_experts": 5,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "pad_token_id": 0,
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip


def _deepseek_ocr2(token: int) -> Any:
    """A tower of queries behind another; a row between what it makes of crops and of the whole."""
    encoder = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, **_TWO}
    vision = {"sam_config": _SAM_TWO, "encoder_config": encoder}
    return _build("DeepseekOcr2", text_config=_DEEPSEEK, vision_config=vision, image_token_id=token)


def _unlimited_ocr(token: int) -> Any:
    """Rows that end lines and views; a window that leaves the first tokens in sight."""
    encoder = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision = {"sam_config": _SAM_TWO, "encoder_config": {**encoder, **_TWO}}
    text = {**_DEEPSEEK, "sliding_window": 8}
    return _build("UnlimitedOcr", text_config=text, vision_config=vision, image_token_id=token)


def _qwen4_exp(token: int) -> Any:
    """Several streams of hidden states; attention to the tokens that an index chooses."""
    text = {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 96, "hc_count": 2, "hc_lowrank": 8,
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 8,
            "indexer_compress_ratio": 2}  # fmt: skip
    return _build("Qwen4Exp", text_config=text, vision_config=_PATCH_16, image_token_id=token, **_VISION_MARKS)


def _dots3_note(token: int) -> Any:
    """Latent keys and values; attention to the tokens that an index chooses; experts in the tower, too."""
    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    text = {**_PLAIN, **latent, "num_key_value_heads": 4, "moe_intermediate_size": 96, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "shared_experts_intermediate_size": 96, "index_topk": 8, "index_head_dim": 32,
            "index_n_heads": 2, "pad_token_id": 0, "layer_types": ["indexed_attention"] * 2}  # fmt: skip
    vision = _vision(**_TWO, patch_size=14, adapter_in_dim=64, adapter_out_dim=HIDDEN, mlp_layer_types=["dense"] * 2)
    audio = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 32,
             "adapter_out_dim": HIDDEN}  # fmt: skip
    return _build(
        "Dots3Note", text_config=text, vision_config=vision, audio_config=audio, image_token_id=token,
        video_token_id=4, audio_token_id=6,
    )  # fmt: skip


_CROPS = {"image_start_id": 3, "image_end_id": 5, "slice_start_id": 6, "slice_end_id": 7, "newline_id": 8}
ENTRIES: dict[str, Entry] = {
    "cohere_compass": _entry(_cohere_compass, _gridded(16)),
    "cosmos3_edge": _entry(_cosmos3_edge, _gridded(16, 1)),
    "deepseek_ocr2": _entry(_deepseek_ocr2, _in_one_row(_pictures(2, 1, 3, side=128))),
    "dots3_note": _entry(_dots3_note, _gridded(14, 1, typed=False)),
    "ernie4_5_vl_moe": _entry(_ernie4_5_vl_moe, _with_kinds),
    "granite4_vision": _entry(_granite4_vision, _granite4_prompts),
    "granite_docling": _entry(_granite_docling, _in_one_row(_tiled(2, 1, 3))),
    "hunyuan_vl": _entry(_hunyuan_vl, _broken_rows),
    "minicpmv4_6": _entry(lambda token: _minicpmv("MiniCPMV4_6", token), _in_strips),
    "minicpmv4_7": _entry(lambda token: _minicpmv("MiniCPMV4_7", token, **_CROPS), _on_canvas),
    "minicpm_ocr": _entry(lambda token: _minicpmv("MiniCPMOcr", token), _in_strips),
    "paddleocr_vl": _entry(_paddleocr_vl, _unflattened(14)),
    "qwen2_5_omni_thinker": _entry(_qwen2_5_omni_thinker, _gridded(14, typed=False)),
    "qwen3_5_moe": _entry(_qwen3_5_moe, _gridded(16)),
    "qwen3_omni_moe_thinker": _entry(_qwen3_omni_moe_thinker, _gridded(16, typed=False)),
    "qwen4_exp": _entry(_qwen4_exp, _gridded(16)),
    "unlimited_ocr": _entry(_unlimited_ocr, _in_one_row(_pictures(2, 1, 3, side=128))),
    "video_llama_3": _entry(_video_llama_3, _merged(_gridded(14, 1, typed=False), 2)),
}
