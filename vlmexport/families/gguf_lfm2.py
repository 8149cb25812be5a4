"""LFM2-VL in llama.cpp, both halves (b11549: src/models/lfm2.cpp, tools/mtmd/models/siglip.cpp, mtmd-image.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import (
    head_dim,
    pixel_statistics,
    refuse_weights,
    require,
    rope_metadata,
    text_metadata,
)
from vlmexport.families.gguf_vision import encoder_rules, resampling, vision_metadata
from vlmexport.model.family import GgufHalf, MetaValue, Transform, linear

_ARCH = "lfm2"
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# What llama.cpp does with a picture is compiled in (clip.cpp, mtmd-image.h); these are the image processor's names.
_TILING = {
    "do_image_splitting": True,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "min_tiles": 2,
    "max_tiles": 10,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
}
_RESAMPLING = ("lanczos", "bilinear", "bicubic")
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


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of the SigLIP 2 tower with LFM2's pixel-unshuffling projector.

    Raises `UnsupportedModelError` for an activation or an image treatment that llama.cpp does not have.
    """
    encoder = config.vision_config
    require(encoder, "hidden_act", _GELU_TANH, "llama.cpp's encoder has GELU by its tanh formula")
    require(config, "projector_hidden_act", (*_GELU_TANH, "gelu"), "llama.cpp's projector has GELU")
    require(config, "projector_bias", (True,), "llama.cpp's projector has biases")
    _check_tiling(config, preprocessor)
    side = int(encoder.num_patches**0.5)
    view = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=side * int(encoder.patch_size), **_plain(encoder)),
        get_text_config=config.get_text_config,
    )
    metadata = {
        **vision_metadata(view, "lfm2"),
        **pixel_statistics(preprocessor, config.model_type),
        "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": float(encoder.layer_norm_eps),
        "clip.vision.projector.scale_factor": int(config.downsample_factor),
        "clip.vision.image_resize_algo": _resampling(config, preprocessor),
    }
    tower, projector = "model.vision_tower", "model.multi_modal_projector"
    kernel = Transform("patch_kernel", (int(encoder.patch_size), int(encoder.num_channels)))
    rules = (
        *encoder_rules(f"{tower}.encoder.layers.{{i}}"),
        linear(f"{tower}.embeddings.patch_embedding", "v.patch_embd", kernel),
        linear(f"{tower}.embeddings.position_embedding", "v.position_embd"),
        linear(f"{tower}.post_layernorm", "v.post_ln"),
        linear(f"{projector}.layer_norm", "mm.input_norm"),
        linear(f"{projector}.linear_1", "mm.1"),
        linear(f"{projector}.linear_2", "mm.2"),
    )
    del names
    return GgufHalf(
        "lfm2",
        rules,
        metadata,
        unused={f"{tower}.head.*": "the tower's pooling head, which the language model does not read"},
        always_f32=("v.position_embd.weight",),
        notes=(
            "llama.cpp gives a picture that it cuts into tiles (one of more than 524288 pixels) black edges, where the "
            "model's processor stretches it: scale pictures down to 700 x 700 pixels for the same answers",
        ),
    )


def _plain(encoder: Any) -> dict[str, Any]:
    keys = ("patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {key: getattr(encoder, key) for key in keys}


def _check_tiling(config: Any, preprocessor: Mapping[str, Any]) -> None:
    for key, theirs in _TILING.items():
        if preprocessor.get(key, theirs) != theirs:
            raise UnsupportedModelError(
                f"{config.model_type}: {key} of its image processor is {preprocessor[key]}, but llama.cpp has {theirs},"
                " so the prompt would be another one"
            )
    patch, factor = int(config.vision_config.patch_size), int(config.downsample_factor)
    ours = int(preprocessor.get("encoder_patch_size", patch)), int(preprocessor.get("downsample_factor", factor))
    if ours != (patch, factor):
        raise UnsupportedModelError(
            f"{config.model_type}: its image processor has patches of {ours[0]} merged by {ours[1]}, but the model "
            f"{patch} and {factor}"
        )


def _resampling(config: Any, preprocessor: Mapping[str, Any]) -> str:
    ours = resampling(preprocessor, config.model_type, "bilinear")
    if ours not in _RESAMPLING:
        raise UnsupportedModelError(
            f"{config.model_type}: its image processor resizes by {ours} (resample {int(preprocessor['resample'])}), "
            f"which llama.cpp does not have (it has {', '.join(_RESAMPLING)})"
        )
    return ours
