"""LFM2 in llama.cpp, its decoder (b11549: src/models/lfm2.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import head_dim, refuse_weights, rope_metadata, text_metadata
from vlmexport.model.family import GgufHalf, MetaValue, Transform, linear

_ARCH = "lfm2"
_NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "embedding_norm": "token_embd_norm",
    "layers.{i}.operator_norm": "blk.{i}.attn_norm",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "layers.{i}.self_attn.out_proj": "blk.{i}.attn_output",
    "layers.{i}.self_attn.q_layernorm": "blk.{i}.attn_q_norm",
    "layers.{i}.self_attn.k_layernorm": "blk.{i}.attn_k_norm",
    "layers.{i}.conv.in_proj": "blk.{i}.shortconv.in_proj",
    "layers.{i}.conv.out_proj": "blk.{i}.shortconv.out_proj",
    "layers.{i}.feed_forward.w1": "blk.{i}.ffn_gate",
    "layers.{i}.feed_forward.w2": "blk.{i}.ffn_down",
    "layers.{i}.feed_forward.w3": "blk.{i}.ffn_up",
}


def text(config: Any, names: Sequence[str]) -> GgufHalf:
    """The rules and keys of the decoder of short convolutions and attention.

    Raises `UnsupportedModelError` for what llama.cpp would compute otherwise.
    """
    no_place = tuple(f"{module}.bias" for module in ("conv", "in_proj", "out_proj", "q_proj", "k_proj", "v_proj"))
    refuse_weights(names, no_place, "llama.cpp's lfm2 has no tensor for it")
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedModelError(
            f"{config.model_type}: {config.num_attention_heads} heads of {head_dim(config)} are not the hidden size "
            f"{config.hidden_size}, which llama.cpp's lfm2 assumes"
        )
    rules = (
        *(linear(source, target) for source, target in _NAMES.items()),
        linear("layers.{i}.conv.conv", "blk.{i}.shortconv.conv", Transform("squeeze_channel")),
    )
    kernels = ("blk.*.shortconv.conv.weight",)  # ggml's short convolution reads F32
    return GgufHalf(_ARCH, rules, _text_keys(config), always_f32=kernels)


def _text_keys(config: Any) -> dict[str, MetaValue]:
    """The common keys; a layer with 0 heads of keys and values is a convolution."""
    sizes = ("model_type", "num_hidden_layers", "max_position_embeddings", "hidden_size", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "rope_parameters")  # fmt: skip
    view = SimpleNamespace(
        intermediate_size=_inner_size(config),
        rms_norm_eps=config.norm_eps,
        head_dim=head_dim(config),
        **{key: getattr(config, key) for key in sizes},
    )
    unknown = set(config.layer_types) - {"conv", "full_attention"}
    if unknown:
        raise UnsupportedModelError(f"{config.model_type}: llama.cpp's lfm2 has no layers of {', '.join(unknown)}")
    kv_heads = [0 if kind == "conv" else int(config.num_key_value_heads) for kind in config.layer_types]
    return {
        **text_metadata(view, _ARCH),
        **rope_metadata(view, _ARCH)[0],
        f"{_ARCH}.attention.head_count_kv": kv_heads,
        f"{_ARCH}.shortconv.l_cache": int(config.conv_L_cache),
    }


def _inner_size(config: Any) -> int:
    """Width of the MLP, as transformers makes it of the config (modeling_lfm2.py, ``Lfm2MLP``)."""
    size = int(config.intermediate_size)
    if not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    multiple = int(config.block_multiple_of)
    return -(-int(config.block_ffn_dim_multiplier * size) // multiple) * multiple
