"""Gemma 3 in llama.cpp, its decoder (b11549: src/models/gemma3.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import head_dim, refuse_weights, require, rope_metadata, text_metadata
from vlmexport.model.family import GgufHalf, MetaValue, Transform, linear

_ARCH = "gemma3"
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_LAYERS_OF_27B = 62
_ADD_ONE = Transform("add_one")
_NORMS = {
    "norm": "output_norm",
    "layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    "layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}
_LINEARS = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
    "layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
}


def text(config: Any, names: Sequence[str]) -> GgufHalf:
    """The rules and keys of the decoder; norms multiply by ``1 + w``, which the file holds as one number.

    Raises `UnsupportedModelError` for what llama.cpp would compute otherwise.
    """
    require(config, "hidden_activation", _GELU_TANH, "llama.cpp's gemma3 has GELU by its tanh formula")
    require(config, "attn_logit_softcapping", (None,), "llama.cpp's gemma3 does not cap attention")
    require(config, "use_bidirectional_attention", (False, None), "llama.cpp's gemma3 attends to the past only")
    refuse_weights(names, ("_proj.bias",), "llama.cpp's gemma3 has no tensor for it")
    _check_attention_scale(config)
    rules = (
        *(linear(source, target) for source, target in _LINEARS.items()),
        *(linear(source, target, _ADD_ONE) for source, target in _NORMS.items()),
    )
    # No final_logit_softcapping: Gemma3ForConditionalGeneration does not cap its logits, whatever its config says.
    return GgufHalf(_ARCH, rules, {**_sizes(config), **_windows(config), **_rope(config)})


def _check_attention_scale(config: Any) -> None:
    """llama.cpp divides by the root of the head's size; with as many layers as the 27B model, of hidden / heads."""
    wide = int(config.num_hidden_layers) == _LAYERS_OF_27B
    theirs = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if int(config.query_pre_attn_scalar) != theirs:
        raise UnsupportedModelError(
            f"{config.model_type}: query_pre_attn_scalar is {config.query_pre_attn_scalar}, but llama.cpp's gemma3 "
            f"takes {theirs} for a model of these sizes"
        )


def _sizes(config: Any) -> dict[str, MetaValue]:
    """The common keys; a window does not limit the context here, since llama.cpp has Gemma's windows."""
    context = f"{_ARCH}.context_length"
    return {**text_metadata(config, _ARCH), context: int(config.max_position_embeddings)}


def _windows(config: Any) -> dict[str, MetaValue]:
    """Which layers see a window only; nothing when none does."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(sliding):
        return {}
    if not config.sliding_window:
        raise UnsupportedModelError(f"{config.model_type}: layers of sliding_attention without a sliding_window")
    return {
        f"{_ARCH}.attention.sliding_window": int(config.sliding_window),
        f"{_ARCH}.attention.sliding_window_pattern": sliding,
    }


def _rope(config: Any) -> dict[str, MetaValue]:
    """The bases of global and local layers and the scaling of the global ones: llama.cpp never scales local ones."""
    full, local = (config.rope_parameters.get(kind) for kind in ("full_attention", "sliding_attention"))
    keys: dict[str, MetaValue] = {}
    if local is not None:
        require(
            SimpleNamespace(model_type=config.model_type, **local),
            "rope_type",
            ("default",),
            "llama.cpp's gemma3 does not scale the positions of its local layers",
        )
        keys[f"{_ARCH}.rope.freq_base_swa"] = float(local["rope_theta"])
    sizes = ("model_type", "max_position_embeddings", "hidden_size", "num_attention_heads", "head_dim")
    view = SimpleNamespace(rope_parameters=full or local, **{key: getattr(config, key) for key in sizes})
    return {**rope_metadata(view, _ARCH)[0], **keys}
