"""The vision sides of Qwen2-VL, Qwen2.5-VL and Qwen3-VL in llama.cpp (b11549: tools/mtmd/models/qwen{2,3}vl.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_qwen import text_arch
from vlmexport.families.gguf_vision import resampling_notes
from vlmexport.model.family import GgufHalf, MetaValue, TensorRule, Transform, linear

_TOWER = "model.visual"
# Qwen2-VL's towers are compiled with these numbers in llama.cpp (clip.cpp, qwen2vl.cpp).
_WINDOW = 112
_MOST_TOKENS = 4096
_NORM_EPSILON = 1e-6  # of every norm of transformers' towers
_THIRDS = Transform("split_rows", (3,))


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
    return replace(half, notes=_notes(config, preprocessor))


def _notes(config: Any, preprocessor: Mapping[str, Any]) -> tuple[str, ...]:
    side = _token_side(config)
    edges = (
        "llama.cpp fits a picture into whole tokens with black edges, where the model's processor stretches it: make "
        f"both sides multiples of {side} pixels for the same answers"
    )
    _, most = _pixel_range(preprocessor)
    large = (
        f"llama.cpp scales pictures down to {_MOST_TOKENS} tokens, the model's processor to {most // side**2}: larger "
        "ones are seen in less detail"
    )
    return (
        edges,
        *((large,) if most > _MOST_TOKENS * side**2 else ()),
        *resampling_notes(preprocessor, config.model_type, "bicubic"),
    )


def _token_side(config: Any) -> int:
    """Pixels of a picture's side that one token stands for."""
    return int(config.vision_config.patch_size) * int(config.vision_config.spatial_merge_size)


def _pixel_range(preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    """The least and most pixels of a resized picture, under either of their names; else Qwen2VLImageProcessor's own."""
    size = preprocessor.get("size") or {}
    least = preprocessor.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = preprocessor.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    return int(least), int(most)


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
        **_pixel_limits(config, preprocessor),
    }


def _pixel_limits(config: Any, preprocessor: Mapping[str, Any]) -> dict[str, MetaValue]:
    """The model's own limits of a picture's size, which llama.cpp takes in place of its 8 to 4096 tokens.

    The upper one is kept at llama.cpp's 4096 tokens: Qwen2.5's window mask is the square of the patches in memory.
    """
    least, most = _pixel_range(preprocessor)
    return {
        "clip.vision.image_min_pixels": least,
        "clip.vision.image_max_pixels": min(most, _MOST_TOKENS * _token_side(config) ** 2),
    }


def _check_rope(encoder: Any) -> None:
    rope = getattr(encoder, "rope_parameters", None) or {}
    if float(rope.get("rope_theta", 10000.0)) != 10000.0:
        raise UnsupportedModelError(
            f"{encoder.model_type}: rope_theta is {rope['rope_theta']}, but llama.cpp's tower has 10000"
        )


def _qwen2(config: Any, metadata: dict[str, MetaValue]) -> GgufHalf:
    encoder = config.vision_config
    require(encoder, "hidden_act", ("quick_gelu",), "llama.cpp's Qwen2-VL tower has quick GELU")
    width, inner = int(encoder.embed_dim), int(encoder.embed_dim * encoder.mlp_ratio)
    _check_not_swapped(config, width, inner)
    mlp = {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
    rules = (*_block_rules(mlp, fused=False), *_merger_rules("ln_q", "mlp.0", "mlp.2"), *_patch_rules())
    sizes = _sizes(projector="qwen2vl_merger", image=560, width=width, inner=inner)
    return GgufHalf("qwen2vl_merger", rules, {**metadata, **sizes})


def _qwen2_5(config: Any, metadata: dict[str, MetaValue]) -> GgufHalf:
    encoder = config.vision_config
    require(encoder, "hidden_act", ("silu",), "llama.cpp's Qwen2.5-VL tower has SiLU")
    require(encoder, "window_size", (_WINDOW,), "llama.cpp's windows are 112 pixels wide")
    width, inner = int(encoder.hidden_size), int(encoder.intermediate_size)
    _check_not_swapped(config, width, inner)
    mlp = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    rules = (*_block_rules(mlp, fused=False), *_merger_rules("ln_q", "mlp.0", "mlp.2"), *_patch_rules())
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
        *_block_rules(mlp, fused=True),
        *_merger_rules("norm", "linear_fc1", "linear_fc2"),
        *_patch_rules(),
        linear(f"{_TOWER}.pos_embed", "v.position_embd"),
        *(rule for number, layer in enumerate(indexes) for rule in _deepstack_rules(number, layer)),
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
    """`image` is a nominal side: pictures keep their own."""
    return {
        "clip.projector_type": projector,
        "clip.vision.image_size": image,
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


def _block_rules(mlp: Mapping[str, str], *, fused: bool) -> tuple[TensorRule, ...]:
    """Rules of one block; Qwen3's graph reads the fused projection, Qwen2's its three parts."""
    source, target = f"{_TOWER}.blocks.{{i}}", "v.blk.{i}"
    parts = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
    split = None if fused else _THIRDS
    return (
        linear(f"{source}.norm1", f"{target}.ln1"),
        linear(f"{source}.norm2", f"{target}.ln2"),
        TensorRule(f"{source}.attn.qkv", tuple(f"{target}.{part}" for part in parts), split, split),
        linear(f"{source}.attn.proj", f"{target}.attn_out"),
        *(linear(f"{source}.{name}", f"{target}.{stem}") for name, stem in mlp.items()),
    )


def _merger_rules(norm: str, first: str, second: str) -> tuple[TensorRule, ...]:
    merger = f"{_TOWER}.merger"
    return (
        linear(f"{merger}.{norm}", "v.post_ln"),
        linear(f"{merger}.{first}", "mm.0"),
        linear(f"{merger}.{second}", "mm.2"),
    )


def _patch_rules() -> tuple[TensorRule, ...]:
    """The convolution over two frames, as one for each; Qwen3's has a bias."""
    source = f"{_TOWER}.patch_embed.proj"
    frames = ("v.patch_embd.weight", "v.patch_embd.weight.1")
    return (
        TensorRule(f"{source}.weight", frames, Transform("split_frames"), whole=True),
        TensorRule(f"{source}.bias", ("v.patch_embd.bias",), whole=True),
    )


def _deepstack_rules(number: int, layer: int) -> tuple[TensorRule, ...]:
    """The merger of an early layer's features: llama.cpp names it by the layer."""
    source, target = f"{_TOWER}.deepstack_merger_list.{number}", f"v.deepstack.{layer}"
    return (
        linear(f"{source}.norm", f"{target}.norm"),
        linear(f"{source}.linear_fc1", f"{target}.fc1"),
        linear(f"{source}.linear_fc2", f"{target}.fc2"),
    )
