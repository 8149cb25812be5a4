"""Tiny checkpoints whose decoders mix attention with layers that keep states: short convolutions, linear attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.tiny_qwen import SPECIAL
from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo import qwen
from tests.zoo.entry import Entry, Example
from vlmexport.model.load import VLM

HIDDEN, VOCAB = 128, 320
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# Two of the four layers with linear attention stand behind one another, so one is repeated.
_LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


def _text(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        **more,
    }


def _make(stem: str, folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    import transformers

    tokenizer = byte_level_tokenizer(SPECIAL, VOCAB)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    config = getattr(transformers, f"{stem}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **ids
    )
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    return save_tiny(model, tokenizer, dict(STATISTICS), folder, "", 0)


def _qwen3_5(folder: Path) -> Path:
    """Gated delta net with more value heads than key heads, gated attention, rotary over half of each head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    text = _text(
        layer_types=_LINEAR, rope_parameters=rope, linear_key_head_dim=16, linear_value_head_dim=24,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=4,
    )  # fmt: skip
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 16,
              "out_hidden_size": HIDDEN, "num_position_embeddings": 64}  # fmt: skip
    return _make("Qwen3_5", folder, text, vision)


def _lfm3_vl(folder: Path) -> Path:
    """Short convolutions between layers of full and sliding attention, which rotate by tables of their own."""
    text = _text(
        model_type="lfm3", layer_types=["conv", "full_attention", "conv", "sliding_attention"], sliding_window=8,
        conv_L_cache=5, conv_bias=True, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    types = ["conv", "conv", "full_attention"]
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "patch_size": 16, "layer_types": types}  # fmt: skip
    return _make("Lfm3Vl", folder, text, vision)


def _plain_prompts(vlm: VLM) -> tuple[Example, ...]:
    """`qwen.prompts` for a model whose positions do not tell pictures from text."""
    return tuple({n: t for n, t in example.items() if n != "mm_token_type_ids"} for example in qwen.prompts(vlm))


ENTRIES: dict[str, Entry] = {
    "qwen3_5": Entry(_qwen3_5, qwen.prompts),
    "lfm3_vl": Entry(_lfm3_vl, _plain_prompts),
}
