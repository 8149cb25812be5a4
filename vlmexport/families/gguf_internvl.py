"""The vision side of InternVL (transformers' own form) in llama.cpp (b11549: tools/mtmd/models/internvl.cpp).

llama.cpp chooses the grid of tiles by the area that a picture fills, InternVL's processor by its aspect ratio: for many
pictures these are other grids, and then prompts differ (a 100 x 60 picture, tiles of 32: 9 tiles against 7). The file
has no key for it; the gate says so by its prompt ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_vision import blocks_used, unused_blocks, vision_metadata
from vlmexport.model.family import GgufHalf, MetaValue, TensorRule, Transform, linear

_TOWER = "model.vision_tower"
_BLOCK = f"{_TOWER}.encoder.layer.{{i}}"
_PROJECTOR = "model.multi_modal_projector"
_RMS_SIZE = (3200, 45)  # llama.cpp knows InternViT-6B, the only one with RMS norms, by its width and depth


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of InternViT with its pixel shuffle and projector.

    llama.cpp puts the class token after the patches and adds the position table as it stands, so the table's first row,
    the class token's, is moved to the end. Raises `UnsupportedModelError` for what llama.cpp computes otherwise.
    """
    del names
    encoder = config.vision_config
    _check(config, encoder)
    metadata: dict[str, MetaValue] = {
        **vision_metadata(config, "internvl"),
        **pixel_statistics(preprocessor, config.model_type),
        **_tiles(preprocessor),
        "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": float(encoder.layer_norm_eps),
        "clip.vision.projector.scale_factor": round(1 / config.downsample_ratio),
        "clip.vision.block_count": blocks_used(config),
    }
    rules = (
        _whole(f"{_TOWER}.embeddings.cls_token", "v.class_embd"),
        _whole(f"{_TOWER}.embeddings.position_embeddings", "v.position_embd.weight", Transform("roll_rows", (-1,))),
        linear(f"{_TOWER}.embeddings.patch_embeddings.projection", "v.patch_embd"),
        linear(f"{_TOWER}.layernorm", "v.post_ln"),
        linear(f"{_BLOCK}.layernorm_before", "v.blk.{i}.ln1"),
        linear(f"{_BLOCK}.layernorm_after", "v.blk.{i}.ln2"),
        linear(f"{_BLOCK}.attention.q_proj", "v.blk.{i}.attn_q"),
        linear(f"{_BLOCK}.attention.k_proj", "v.blk.{i}.attn_k"),
        linear(f"{_BLOCK}.attention.v_proj", "v.blk.{i}.attn_v"),
        linear(f"{_BLOCK}.attention.q_norm", "v.blk.{i}.attn_q_norm"),
        linear(f"{_BLOCK}.attention.k_norm", "v.blk.{i}.attn_k_norm"),
        linear(f"{_BLOCK}.attention.projection_layer", "v.blk.{i}.attn_out"),
        linear(f"{_BLOCK}.mlp.fc1", "v.blk.{i}.ffn_up"),
        linear(f"{_BLOCK}.mlp.fc2", "v.blk.{i}.ffn_down"),
        _whole(f"{_BLOCK}.lambda_1", "v.blk.{i}.ls1.weight"),
        _whole(f"{_BLOCK}.lambda_2", "v.blk.{i}.ls2.weight"),
        linear(f"{_PROJECTOR}.layer_norm", "mm.model.mlp.0"),
        linear(f"{_PROJECTOR}.linear_1", "mm.model.mlp.1"),
        linear(f"{_PROJECTOR}.linear_2", "mm.model.mlp.3"),
    )
    unused = {
        f"{_TOWER}.embeddings.mask_token": "it stands for masked patches in training only",
        **unused_blocks(config, _BLOCK),
    }
    return GgufHalf("internvl", rules, metadata, unused=unused, always_f32=("v.position_embd.weight",))


def _whole(source: str, target: str, transform: Transform | None = None) -> TensorRule:
    return TensorRule(source, (target,), transform, whole=True)


def _check(config: Any, encoder: Any) -> None:
    require(encoder, "hidden_act", ("gelu", "gelu_pytorch_tanh"), "llama.cpp's encoder is run with GELU")
    require(config, "projector_hidden_act", ("gelu", "gelu_pytorch_tanh"), "llama.cpp's projector has GELU")
    require(config, "vision_feature_select_strategy", ("default",), "llama.cpp drops the class token")
    require(encoder, "use_absolute_position_embeddings", (True,), "llama.cpp adds a table of positions")
    rms = (encoder.hidden_size, encoder.num_hidden_layers) == _RMS_SIZE
    norm = "rms_norm" if rms else "layer_norm"
    require(encoder, "norm_type", (norm,), f"llama.cpp has {norm} in an encoder of this size")
    if encoder.use_qk_norm and not rms:
        raise UnsupportedModelError(
            f"{config.model_type}: use_qk_norm is set, but llama.cpp would apply layer norms in an encoder of this size"
        )
    if round(1 / config.downsample_ratio) * config.downsample_ratio != 1:
        raise UnsupportedModelError(f"{config.model_type}: downsample_ratio {config.downsample_ratio} is not 1 / n")


def _tiles(preprocessor: Mapping[str, Any]) -> dict[str, MetaValue]:
    """How many tiles a picture is cut into; InternVLProcessor cuts unless it was told not to."""
    return {
        "clip.vision.preproc_min_tiles": int(preprocessor.get("min_patches", 1)),
        "clip.vision.preproc_max_tiles": int(preprocessor.get("max_patches", 12)),
    }
