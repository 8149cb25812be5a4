"""Tiny checkpoints of families whose decoders are mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_qwen import make_tiny_qwen
from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo import qwen
from tests.zoo.entry import Entry, Example
from tests.zoo.models import HIDDEN, IMAGE, VOCAB, Pixels, count_rows
from vlmexport.model.load import VLM

_SPECIAL = ("<|endoftext|>", "<|im_end|>", IMAGE)
_MARKS = ("image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id")
_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def _qwen3_vl_moe(folder: Path) -> Path:
    """Five experts, so that some get no row of a short prompt; one layer among them is dense."""
    text = {"num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [3]}
    return make_tiny_qwen("qwen3_vl_moe", folder, text=text)


def _glm4v_moe(folder: Path) -> Path:
    """GLM-4.5V: a dense layer first, then experts in two groups of which one is chosen, with a bias for the choice."""
    import transformers

    tokens = ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>")
    tokenizer = byte_level_tokenizer(("<|endoftext|>", "<|im_end|>", *tokens), VOCAB)
    ids = dict(zip(_MARKS, map(tokenizer.convert_tokens_to_ids, tokens), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_group": 2,
               "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "image_size": 112,
              "patch_size": 14, "out_hidden_size": HIDDEN, "spatial_merge_size": 2}  # fmt: skip
    config = transformers.Glm4vMoeConfig(
        text_config={**_TEXT, "rope_parameters": rope, **experts},
        vision_config=vision,
        tie_word_embeddings=False,
        **ids,
    )
    model = transformers.Glm4vMoeForConditionalGeneration(config)
    for index, layer in enumerate(model.model.language_model.layers[1:]):
        generator = torch.Generator().manual_seed(index)
        layer.mlp.gate.e_score_correction_bias.copy_(0.2 * torch.randn(6, generator=generator))
    return save_tiny(model, tokenizer, dict(STATISTICS), folder, "", 0)


def _aria(folder: Path) -> Path:
    """Experts that are stored ``[inputs, outputs]``, beside shared ones."""
    vision = {"model_type": "idefics3_vision", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {**_TEXT, "model_type": "aria_text", "intermediate_size": 96, "head_dim": 32, "moe_num_experts": 5,
            "moe_topk": 2, "moe_num_shared_experts": 2}  # fmt: skip
    return _save("Aria", folder, text, vision, projector_patch_to_query_dict={"16": 6})


def _llama4(folder: Path) -> Path:
    """Experts whose rows are scaled before they run; layers that see chunks, and layers without rotary positions."""
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8, "vision_output_dim": 96, "projector_input_dim": 96,
              "projector_output_dim": 96}  # fmt: skip
    text = {**_TEXT, "intermediate_size": 96, "intermediate_size_mlp": 192, "num_hidden_layers": 3, "head_dim": 32,
            "num_local_experts": 3, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1], "attention_chunk_size": 16, "floor_scale": 8}  # fmt: skip
    return _save("Llama4", folder, text, vision)


def _save(stem: str, folder: Path, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Path:
    import transformers

    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    config = getattr(transformers, f"{stem}Config")(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    return save_tiny(model, tokenizer, dict(STATISTICS), folder, "", 0)


def _pictures(*counts: int, each: int = 0, after: int = 5) -> Callable[[VLM], tuple[Example, ...]]:
    """Prompts about `counts` pictures each, which stand for `each` rows (0: as the model says).

    `after`: so many tokens of text stand behind the pictures.
    """

    def examples(vlm: VLM) -> tuple[Example, ...]:
        generator = torch.Generator().manual_seed(1)
        found = []
        for count in counts:
            pixels: Pixels = {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
            rows = each * count or count_rows(vlm.model, vlm.facts.image_token_id, pixels)
            before, behind = (torch.randint(10, VOCAB - 60, (1, n), generator=generator) for n in (3, after))
            ids = torch.cat([before, torch.full((1, rows), vlm.facts.image_token_id), behind], dim=1)
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels})
        return tuple(found)

    return examples


ENTRIES = {
    "qwen3_vl_moe": Entry(make=_qwen3_vl_moe, examples=qwen.prompts),
    "glm4v_moe": Entry(make=_glm4v_moe, examples=qwen.prompts),
    "aria": Entry(make=_aria, examples=_pictures(2, 1, 3)),
    "llama4": Entry(make=_llama4, examples=_pictures(2, 1, 3, each=4, after=33)),
}
