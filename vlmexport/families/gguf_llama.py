"""Llama, Mistral, Ministral 3, Qwen2 and Qwen3 decoders in llama.cpp (b11549: src/models/)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import (
    head_dim,
    kv_heads,
    refuse_weights,
    require,
    rope_metadata,
    rope_parameters,
    text_metadata,
)
from vlmexport.model.family import GgufHalf, MetaValue, TensorRule, Transform, linear


@dataclass(frozen=True)
class _Form:
    """What sets one decoder apart.

    `pairs`: the architecture rotates neighbouring elements, so rows of q and k are permuted; `factors`: it reads
    ``rope_freqs.weight``; `betas`: it reads YaRN's ramp; `square`: it assumes heads x head_dim = hidden size;
    `no_place`: ends of names that it has no tensor for.
    """

    arch: str
    pairs: bool = False
    factors: bool = False
    betas: bool = False
    square: bool = False
    no_place: tuple[str, ...] = ()


_MLP_BIASES = ("gate_proj.bias", "up_proj.bias", "down_proj.bias")
_FORMS = {
    "llama": _Form("llama", pairs=True, factors=True),
    "mistral": _Form("llama", pairs=True, factors=True),
    "ministral3": _Form("mistral3", pairs=True, factors=True, betas=True),
    "qwen2": _Form("qwen2", square=True, no_place=(*_MLP_BIASES, "o_proj.bias", "q_norm.weight")),
    "qwen3": _Form("qwen3", no_place=(*_MLP_BIASES, "o_proj.bias")),
}


def text(config: Any, names: Sequence[str]) -> GgufHalf:
    """The rules and keys of a decoder; raises `UnsupportedModelError` for what llama.cpp would compute otherwise."""
    form = _FORMS[config.model_type]
    require(config, "hidden_act", ("silu", "swish"), f"llama.cpp's {form.arch} has SiLU in its MLP")
    refuse_weights(names, form.no_place, f"llama.cpp's {form.arch} has no tensor for it")
    if form.square and head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedModelError(
            f"{config.model_type}: {config.num_attention_heads} heads of {head_dim(config)} are not the hidden size "
            f"{config.hidden_size}, which llama.cpp's {form.arch} assumes"
        )
    rope_keys, computed = rope_metadata(config, form.arch, factors=form.factors, betas=form.betas)
    metadata = {**text_metadata(config, form.arch), **rope_keys, **_temperature(config, form.arch)}
    return GgufHalf(form.arch, decoder_rules(config, pairs=form.pairs), metadata, computed)


def decoder_rules(config: Any, *, pairs: bool) -> tuple[TensorRule, ...]:
    """Rules of a decoder with Llama's names; `pairs`: rows of q and k are permuted for Llama's rotary embedding."""
    query = Transform("permute", (int(config.num_attention_heads),)) if pairs else None
    key = Transform("permute", (kv_heads(config),)) if pairs else None
    return (
        linear("embed_tokens", "token_embd"),
        linear("norm", "output_norm"),
        linear("lm_head", "output"),
        linear("layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
        linear("layers.{i}.self_attn.q_proj", "blk.{i}.attn_q", query, query),
        linear("layers.{i}.self_attn.k_proj", "blk.{i}.attn_k", key, key),
        linear("layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
        linear("layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
        linear("layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
        linear("layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
        linear("layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
        linear("layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
        linear("layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
        linear("layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
    )


def _temperature(config: Any, arch: str) -> dict[str, MetaValue]:
    """Ministral 3 scales queries by 1 + beta ln(1 + floor(position / original context)); so does mistral3."""
    if config.model_type != "ministral3":
        return {}
    rope = rope_parameters(config)
    beta = float(rope.get("llama_4_scaling_beta") or 0)
    if beta and "original_max_position_embeddings" not in rope:
        raise UnsupportedModelError("ministral3: llama_4_scaling_beta without original_max_position_embeddings")
    return {f"{arch}.attention.temperature_scale": beta} if beta else {}
