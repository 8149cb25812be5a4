"""Tiny checkpoints of newer and rarer families: latent attention, towers of one layer, and some that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.zoo.entry import Entry, Example
from tests.zoo.models import Pixels, _build, _noise, _sized, _text, _vision
from tests.zoo.more import _IMAGE_MARKS, _QWEN_VISION, _entry, _gridded, _in_one_row, _prompt
from vlmexport.model.load import VLM

_PLAIN = {name: value for name, value in _text("").items() if name != "model_type"}
_WINDOW = {"sliding_window": 8, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Keys of 16 + 16 numbers of each head, made with the values of a latent of 32 and 16 numbers for all heads.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0,
    "num_hidden_layers": 2, **_EXPERTS,
}  # fmt: skip
_INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
_PIXTRAL = _vision("pixtral", image_size=64, head_dim=32, num_hidden_layers=2)
_TOWER = _vision(patch_size=14, pos_emb_height=8, pos_emb_width=8, num_hidden_layers=2)


def _fuyu(token: int) -> Any:
    """Patches go through one linear layer into the decoder."""
    text = _text("persimmon", num_key_value_heads=4, partial_rotary_factor=0.5, hidden_act="relu2")
    config = transformers.FuyuConfig(text_config=text, patch_size=8, image_token_id=token)
    return transformers.FuyuForCausalLM(config)


def _rows_of_patches(vlm: VLM) -> tuple[Example, ...]:
    token = vlm.facts.image_token_id
    counted = enumerate((6, 4, 12))
    return tuple({**_prompt([n], token, i), "pixel_values": _noise(1, n, 192, seed=i)} for i, n in counted)


def _gemma4_unified(token: int) -> Any:
    """No tower: patches are normalised and projected, and those that are padding dropped behind that."""
    text = {**_PLAIN, "pad_token_id": 0, "global_head_dim": 64, "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8}  # fmt: skip
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 32,
              "output_proj_dims": 64}  # fmt: skip
    marks = {"video_token_id": 4, "audio_token_id": 5, "boi_token_id": 3, "eoi_token_id": 6, "boa_token_id": 7}
    return _build(
        "Gemma4Unified", text_config=text, vision_config=vision, audio_config=None, image_token_id=token,
        eoa_token_index=8, **marks,
    )  # fmt: skip


def _padded_patches() -> tuple[Pixels, ...]:
    """Pictures of up to 12 patches, with the column and row of each, and -1 for padding."""
    made = []
    for index, grids in enumerate((((3, 4),), ((2, 5),), ((3, 4), (4, 2)))):
        pixels = torch.zeros(len(grids), 12, 192)
        places = torch.full((len(grids), 12, 2), -1)
        for picture, (rows, columns) in enumerate(grids):
            pixels[picture, : rows * columns] = _noise(rows * columns, 192, seed=index * 10 + picture).sigmoid()
            found = [(column, row) for row in range(rows) for column in range(columns)]
            places[picture, : rows * columns] = torch.tensor(found)
        made.append({"pixel_values": pixels, "image_position_ids": places})
    return tuple(made)


def _typed(examples: Callable[[VLM], tuple[Example, ...]]) -> Callable[[VLM], tuple[Example, ...]]:
    """`examples` that say which of their tokens are pictures'."""

    def made(vlm: VLM) -> tuple[Example, ...]:
        token = vlm.facts.image_token_id
        return tuple({**one, "mm_token_type_ids": (one["input_ids"] == token).int()} for one in examples(vlm))

    return made


def _kimi_k25(token: int) -> Any:
    """Values that are narrower than keys; pictures are cut into patches for a convolution."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = _text("deepseek_v3", **{**_LATENT, "v_head_dim": 24, "head_dim": 16, "rope_parameters": rope})
    return _build(
        "Kimi_K25", text_config=text, vision_config=_TOWER, projection_hidden_size=64, image_token_id=token,
        video_token_id=4, vision_start_token_id=3, vision_end_token_id=5,
    )  # fmt: skip


def _square_patches(vlm: VLM) -> tuple[Example, ...]:
    examples = _gridded(14, frames=1, typed=False)(vlm)
    return tuple({**one, "pixel_values": one["pixel_values"].reshape(-1, 3, 14, 14)} for one in examples)


def _mistral4(token: int) -> Any:
    """Queries that grow with their position, behind the 16 tokens that positions were made for."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 64.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0,
            "beta_slow": 1.0}  # fmt: skip
    text = _text("mistral4", **_LATENT, rope_parameters=rope)
    return _build(
        "Mistral3", text_config=text, image_token_index=token, spatial_merge_size=2, vision_config=_PIXTRAL,
        vision_feature_layer=-1,
    )  # fmt: skip


def _mistral_large4(token: int) -> Any:
    """Tokens that are attended to are chosen by an indexer."""
    text = {**_PLAIN, **_LATENT, **_INDEXER, "head_dim": 16}
    del text["q_lora_rank"]
    return _build("MistralLarge4", text_config=text, image_token_index=token, vision_config=_PIXTRAL)


def _glm5_next(token: int) -> Any:
    text = {**_PLAIN, **_LATENT, **_INDEXER, "qk_rope_head_dim": 0, "qk_nope_head_dim": 32, "head_dim": 0,
            "linear_head_dim": 16, "linear_num_heads": 4, "index_kpool": 4, "mlp_layer_types": ["dense", "dense"],
            "layer_types": ["linear_attention", "indexed_attention"]}  # fmt: skip
    vision = {**_QWEN_VISION, "image_size": 112, "spatial_merge_size": 2, "projection_intermediate_size": 96}
    return _build("Glm5Next", text_config=text, vision_config=vision, image_token_id=token, **_IMAGE_MARKS)


def _minimax_m3_vl(token: int) -> Any:
    """Blocks of tokens that are attended to are chosen by an indexer."""
    text = {**_PLAIN, "dense_intermediate_size": 96, "shared_intermediate_size": 64, "intermediate_size": 64,
            "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16, "num_hidden_layers": 2,
            "mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2}  # fmt: skip
    config = transformers.MiniMaxM3VLConfig(
        text_config=text, vision_config=_vision(patch_size=14), projector_hidden_size=96, image_token_index=token,
        video_token_index=4,
    )  # fmt: skip
    return transformers.MiniMaxM3SparseForConditionalGeneration(config)


def _step3p7(token: int) -> Any:
    """A whole picture and its parts are encoded and projected one after the other."""
    text = {**_PLAIN, **_WINDOW, **_EXPERTS, "mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 64}
    vision = _vision(mlp_ratio=1.5, max_position_embeddings=16)
    return _build("Step3p7", text_config=text, vision_config=vision, image_token_id=token)


def _with_parts() -> tuple[Pixels, ...]:
    counts = ((2,), (1,), (2, 3))
    return tuple(
        {"pixel_values": _noise(len(c), 3, 32, 32, seed=i), "pixel_values_local": _noise(sum(c), 3, 32, 32, seed=9 + i),
         "num_local_patches": torch.tensor(c)}
        for i, c in enumerate(counts)
    )  # fmt: skip


_SIZED = _in_one_row(_sized(((32, 48),), ((48, 32),), ((32, 48), (64, 32))))
ENTRIES: dict[str, Entry] = {
    "fuyu": _entry(_fuyu, _rows_of_patches),
    "gemma4_unified": _entry(_gemma4_unified, _typed(_in_one_row(_padded_patches))),
    "glm5_next": _entry(_glm5_next, _gridded(14)),
    "kimi_k25": _entry(_kimi_k25, _square_patches),
    "minimax_m3_vl": _entry(_minimax_m3_vl, _gridded(14, typed=False)),
    "mistral4": _entry(_mistral4, _SIZED),
    "mistral_large4": _entry(_mistral_large4, _SIZED),
    "step3p7": _entry(_step3p7, _in_one_row(_with_parts)),
}
