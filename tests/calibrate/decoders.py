"""Tiny random decoders of many kinds inside a Llava model, and batches with padding that reach them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.tiny import randomise
from vlmexport.calibrate.capture import Batch
from vlmexport.split.decoder import DecoderPart

HIDDEN = 64
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {"model_type": "llama"},
    "ungrouped": {"model_type": "llama", "num_key_value_heads": 4},
    "biased": {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "offset_norms": {"model_type": "gemma"},
    "many_norms": {"model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 16},
    "head_norms": {"model_type": "qwen3"},
    "fused": {"model_type": "phi3", "num_key_value_heads": 4},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, **_EXPERTS},
    "router_and_experts": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 64, **_EXPERTS},
    "shared_expert": {
        "model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64, **_EXPERTS,
    },
    "parallel": {"model_type": "cohere"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
}  # fmt: skip


def make_decoder(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A Llava model in eval mode whose text side is `variant`; nothing in it is 0 or 1."""
    keys = {**_SIZES, **VARIANTS[variant]}
    text = AutoConfig.for_model(keys.pop("model_type"), **keys)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    tied = keys["tie_word_embeddings"]
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, tie_word_embeddings=tied)
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed)
    return model.to(dtype).requires_grad_(False)


def part_of(model: Any) -> DecoderPart:
    return DecoderPart(model.get_decoder(), model.get_output_embeddings())


def make_batches(count: int = 3, seed: int = 0) -> list[Batch]:
    """Right-padded batches of 2 with unlike features: some are large, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(HIDDEN, generator=generator))
    batches = []
    for index in range(count):
        length = 24 + 2 * index
        valid = torch.arange(length) < torch.tensor([[length], [length - 5]])
        embeds = torch.randn(2, length, HIDDEN, generator=generator) * size
        embeds[~valid] = 100.0
        kwargs = {"inputs_embeds": embeds, "attention_mask": valid.long(), "past_key_values": None}
        nothing = torch.zeros_like(valid)
        batches.append(Batch(kwargs, valid, nothing, nothing.long(), nothing))
    return batches


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` of the valid positions."""
    with torch.no_grad():
        hidden = model.get_decoder()(**batch.kwargs, use_cache=False).last_hidden_state
        out: torch.Tensor = model.get_output_embeddings()(hidden)
    return out[batch.valid]


def schemes_of(model: Any, scheme: Any) -> dict[str, Any]:
    """`scheme` for every linear layer and packed expert of the decoder's layers, and for the LM head."""
    from vlmexport.split.names import weight_names

    names = weight_names(model, model.get_decoder())
    linears = {id(m.weight) for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)}
    parameters = dict(model.named_parameters())
    layers = {n: scheme for n in names if id(parameters[n]) in linears or parameters[n].ndim == 3}
    return {**layers, "lm_head.weight": scheme}
