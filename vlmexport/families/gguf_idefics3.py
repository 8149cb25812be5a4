"""The vision side of Idefics3, SmolVLM and SmolVLM2 in llama.cpp (b11549: tools/mtmd/models/siglip.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_vision import encoder_rules, vision_metadata
from vlmexport.model.family import GgufHalf, linear

_GELU_TANH = ("gelu_pytorch_tanh", "gelu_fast", "gelu_new")


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of a SigLIP encoder with Idefics3's connector.

    Raises `UnsupportedModelError` for an activation or an image treatment that llama.cpp does not have.
    """
    del names
    encoder = config.vision_config
    require(encoder, "hidden_act", _GELU_TANH, "llama.cpp's encoder has GELU by its tanh formula")
    metadata = {
        **vision_metadata(config, "idefics3"),
        **pixel_statistics(preprocessor, config.model_type),
        "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": float(encoder.layer_norm_eps),
        "clip.vision.projector.scale_factor": int(config.scale_factor),
        "clip.vision.preproc_image_size": _longest_edge(config, preprocessor),
    }
    rules = (
        *encoder_rules("model.vision_model.encoder.layers.{i}"),
        linear("model.vision_model.embeddings.patch_embedding", "v.patch_embd"),
        linear("model.vision_model.embeddings.position_embedding", "v.position_embd"),
        linear("model.vision_model.post_layernorm", "v.post_ln"),
        linear("model.connector.modality_projection.proj", "mm.model.fc"),
    )
    always_f32 = ("v.patch_embd.weight", "v.position_embd.weight")
    return GgufHalf("idefics3", rules, metadata, always_f32=always_f32)


def _longest_edge(config: Any, preprocessor: Mapping[str, Any]) -> int:
    """Pixels of the longer side before the picture is cut into tiles."""
    if not preprocessor.get("do_image_splitting", True):
        raise UnsupportedModelError(
            f"{config.model_type}: do_image_splitting is false, but llama.cpp always cuts a picture into tiles and a "
            "whole view, so the prompt would be another one"
        )
    tile = int((preprocessor.get("max_image_size") or {}).get("longest_edge", config.vision_config.image_size))
    if tile != config.vision_config.image_size:
        raise UnsupportedModelError(
            f"{config.model_type}: tiles are {tile} pixels wide (max_image_size), but llama.cpp cuts them by the "
            f"encoder's image_size, {config.vision_config.image_size}"
        )
    size = preprocessor.get("size")
    if not isinstance(size, Mapping) or "longest_edge" not in size:
        raise UnsupportedModelError(
            f"{config.model_type}: size of its image processor is {size!r}, but llama.cpp scales pictures by a "
            "longest_edge"
        )
    return int(size["longest_edge"])
