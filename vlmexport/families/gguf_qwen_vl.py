"""The vision sides of Qwen2-VL, Qwen2.5-VL and Qwen3-VL in llama.cpp (b11549: tools/mtmd/models/qwen{2,3}vl.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_qwen import text_arch
from vlmexport.families.gguf_qwen_pixels import pixel_limits, pixel_notes
from vlmexport.families.gguf_qwen_rules import TOWER, block_rules, deepstack_rules, merger_rules, patch_rules
from vlmexport.model.family import GgufHalf, MetaValue, linear

_WINDOW = 112  # pixels, compiled into llama.cpp (clip.cpp, qwen2vl.cpp)
_NORM_EPSILON = 1e-6  # of every norm of transformers' towers


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of a Qwen tower with its merger; raises `UnsupportedModelError` for what llama.cpp lacks."""
    del names
    encoder = config.vision_config
    require(encoder, "temporal_patch_size", (2,), "llama.cpp shows a still picture as two frames")
    require(encoder, "spatial_merge_size", (2,), "llama.cpp merges 2 x 2 patches")
    require(encoder, "in_channels", (3,), "llama.cpp reads three colours")
    _check_rope(encoder)
    build = {"qwen2_vl": _qwen2, "qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3, "qwen3_vl_moe": _qwen3}
    half = build[config.model_type](config, _metadata(config, preprocessor))
    return replace(half, notes=pixel_notes(config, preprocessor))


def _metadata(config: Any, preprocessor: Mapping[str, Any]) -> dict[str, MetaValue]:
    encoder = config.vision_config
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": int(config.get_text_config().hidden_size),
        "clip.vision.patch_size": int(encoder.patch_size),
        "clip.vision.block_count": int(encoder.depth),
        "clip.vision.attention.head_count": int(encoder.num_heads),
        "clip.vision.attention.layer_norm_epsilon": _NORM_EPSILON,
        "clip.vision.spatial_merge_size": int(encoder.spatial_merge_size),
        **pixel_statistics(preprocessor, config.model_type),
        **pixel_limits(config, preprocessor),
    }


def _check_rope(encoder: Any) -> None:
    if float((rope := getattr(encoder, "rope_parameters", None) or {}).get("rope_theta", 10000.0)) != 10000.0:
        raise UnsupportedModelError(
            f"{encoder.model_type}: rope_theta is {rope['rope_theta']}, but llama.cpp's tower has 10000"
        )


def _qwen2(config: Any, metadata: dict[str, MetaValue]) -> GgufHalf:
    encoder = config.vision_config
    require(encoder, "hidden_act", ("quick_gelu",), "llama.cpp's Qwen2-VL tower has quick GELU")
    width, inner = int(encoder.embed_dim), int(encoder.embed_dim * encoder.mlp_ratio)
    _check_not_swapped(config, width, inner)
    mlp = {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
    rules = (*block_rules(mlp, fused=False), *merger_rules("ln_q", "mlp.0", "mlp.2"), *patch_rules())
    sizes = _sizes(projector="qwen2vl_merger", image=560, width=width, inner=inner)
    return GgufHalf("qwen2vl_merger", rules, {**metadata, **sizes})


def _qwen2_5(config: Any, metadata: dict[str, MetaValue]) -> GgufHalf:
    encoder = config.vision_config
    require(encoder, "hidden_act", ("silu",), "llama.cpp's Qwen2.5-VL tower has SiLU")
    require(encoder, "window_size", (_WINDOW,), "llama.cpp's windows are 112 pixels wide")
    width, inner = int(encoder.hidden_size), int(encoder.intermediate_size)
    _check_not_swapped(config, width, inner)
    mlp = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    rules = (*block_rules(mlp, fused=False), *merger_rules("ln_q", "mlp.0", "mlp.2"), *patch_rules())
    sizes = _sizes(projector="qwen2.5vl_merger", image=560, width=width, inner=inner)
    windows: dict[str, MetaValue] = {"clip.use_silu": True, "clip.vision.n_wa_pattern": _window_pattern(encoder)}
    return GgufHalf("qwen2.5vl_merger", rules, {**metadata, **sizes, **windows})


def _qwen3(config: Any, metadata: dict[str, MetaValue]) -> GgufHalf:
    encoder = config.vision_config
    require(encoder, "hidden_act", ("gelu_pytorch_tanh",), "llama.cpp's Qwen3-VL tower has GELU by its tanh formula")
    side = int(encoder.num_position_embeddings**0.5)
    if side**2 != encoder.num_position_embeddings:
        raise UnsupportedModelError(
            f"{config.model_type}: {encoder.num_position_embeddings} position embeddings are not a square, as "
            "llama.cpp reads them"
        )
    indexes = [int(index) for index in encoder.deepstack_visual_indexes]
    if indexes != sorted(set(indexes)):
        raise UnsupportedModelError(
            f"{config.model_type}: deepstack_visual_indexes {indexes} do not rise, but llama.cpp hands the features to "
            "the decoder in the order of the layers"
        )
    mlp = {"mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down"}
    rules = (
        *block_rules(mlp, fused=True),
        *merger_rules("norm", "linear_fc1", "linear_fc2"),
        *patch_rules(),
        linear(f"{TOWER}.pos_embed", "v.position_embd"),
        *(rule for number, layer in enumerate(indexes) for rule in deepstack_rules(number, layer)),
    )
    width, inner = int(encoder.hidden_size), int(encoder.intermediate_size)
    sizes = _sizes(projector="qwen3vl_merger", image=side * int(encoder.patch_size), width=width, inner=inner)
    deepstack: dict[str, MetaValue] = {
        "clip.use_gelu": True,
        "clip.vision.is_deepstack_layers": [layer in indexes for layer in range(int(encoder.depth))],
    }
    arch = text_arch(config.get_text_config())
    return GgufHalf(
        "qwen3vl_merger",
        rules,
        {**metadata, **sizes, **deepstack},
        always_f32=("v.position_embd.weight",),
        text_metadata={f"{arch}.n_deepstack_layers": len(indexes)},
    )


def _sizes(projector: str, image: int, width: int, inner: int) -> dict[str, MetaValue]:
    return {
        "clip.projector_type": projector,
        "clip.vision.image_size": image,  # a nominal side: pictures keep their own
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": inner,
    }


def _check_not_swapped(config: Any, width: int, inner: int) -> None:
    """Refuse an MLP as wide as the tower: clip.cpp takes it for an old file and swaps its two matrices."""
    if width == inner:
        raise UnsupportedModelError(
            f"{config.model_type}: the vision MLP is as wide as the tower ({width}), which llama.cpp takes for a file "
            "with its two matrices swapped"
        )


def _window_pattern(encoder: Any) -> int:
    """Every how many layers one attends to the whole picture, as llama.cpp counts them."""
    full = sorted(int(index) for index in encoder.fullatt_block_indexes)
    pattern = full[0] + 1 if full else 0
    if not full or full != list(range(pattern - 1, int(encoder.depth), pattern)):
        raise UnsupportedModelError(
            f"{encoder.model_type}: fullatt_block_indexes {full} of {encoder.depth} layers are not every n-th layer, "
            "as in llama.cpp"
        )
    if pattern == 1:
        raise UnsupportedModelError(
            f"{encoder.model_type}: every layer attends to the whole picture (fullatt_block_indexes {full}), but "
            "llama.cpp stops without a layer that has windows"
        )
    return pattern
