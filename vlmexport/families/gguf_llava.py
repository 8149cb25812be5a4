"""The vision side of LLaVA in llama.cpp (b11549: tools/mtmd/models/llava.cpp, projector ``mlp``).

LLaVA with Pixtral's encoder is Pixtral's (`vlmexport.families.gguf_pixtral`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families import gguf_pixtral
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_vision import blocks_used, encoder_rules, unused_blocks, vision_metadata
from vlmexport.model.family import GgufHalf, MetaValue, linear

_TOWER = "model.vision_tower"
_BLOCK = f"{_TOWER}.encoder.layers.{{i}}"
_GELU = ("gelu", "gelu_pytorch_tanh", "gelu_fast", "gelu_new")
_POOLER = "the attention pooling gives one vector for the whole picture, which LLaVA does not read"


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of LLaVA's encoder and its projector of two linears.

    Raises `UnsupportedModelError` for what llama.cpp computes otherwise: anyres packing (LLaVA-NeXT) and CLIP's class
    token.
    """
    encoder = config.vision_config
    if encoder.model_type == "pixtral":
        return gguf_pixtral.vision(config, preprocessor, names)
    _refuse(config, encoder)
    require(config, "projector_hidden_act", _GELU, "llama.cpp's projector has GELU")
    require(config, "vision_feature_select_strategy", ("full",), "there is no class token to drop")
    rules = (
        *encoder_rules(_BLOCK),
        linear(f"{_TOWER}.embeddings.patch_embedding", "v.patch_embd"),
        linear(f"{_TOWER}.embeddings.position_embedding", "v.position_embd"),
        linear(f"{_TOWER}.post_layernorm", "v.post_ln"),
        linear("model.multi_modal_projector.linear_1", "mm.0"),
        linear("model.multi_modal_projector.linear_2", "mm.2"),
    )
    metadata: dict[str, MetaValue] = {
        **vision_metadata(config, "mlp"),
        **pixel_statistics(preprocessor, config.model_type),
        **_activation(encoder),
        **_stretching(preprocessor),
        "clip.vision.attention.layer_norm_epsilon": float(encoder.layer_norm_eps),
        "clip.vision.block_count": blocks_used(config),
        # Without this key llama.cpp leaves the last block out once more.
        "clip.vision.feature_layer": [blocks_used(config)],
    }
    unused = {f"{_TOWER}.head.*": _POOLER, **unused_blocks(config, _BLOCK)}
    if blocks_used(config) < encoder.num_hidden_layers:
        unused[f"{_TOWER}.post_layernorm.*"] = "the features are taken before the last block, so before this norm"
    return GgufHalf("mlp", rules, metadata, _zero_biases(config, names), unused)


def _refuse(config: Any, encoder: Any) -> None:
    if config.model_type == "llava_next":
        raise UnsupportedModelError(
            "llava_next: llama.cpp (b11549) hands tiles over one after the other, without image_newline, without the "
            "rows of the whole picture and without cutting the padding off, so its prompts cannot equal the model's"
        )
    if encoder.model_type == "clip_vision_model":
        raise UnsupportedModelError(
            f"{config.model_type}: llama.cpp (b11549) puts CLIP's class token after the patches but drops the first "
            "patch in its place and shifts the positions (ggml-org/llama.cpp#25814); LLaVA with a SigLIP encoder works"
        )
    if encoder.model_type != "siglip_vision_model":
        raise UnsupportedModelError(
            f"{config.model_type}: no GGUF form of a {encoder.model_type} encoder is known; known: siglip, pixtral"
        )


def _activation(encoder: Any) -> dict[str, MetaValue]:
    """The encoder's activation; without a key it is the quick GELU."""
    require(encoder, "hidden_act", (*_GELU, "silu", "swish", "quick_gelu"), "llama.cpp's encoder does not have it")
    if encoder.hidden_act == "quick_gelu":
        return {}
    return {"clip.use_silu" if encoder.hidden_act in ("silu", "swish") else "clip.use_gelu": True}


def _stretching(preprocessor: Mapping[str, Any]) -> dict[str, MetaValue]:
    """The key that makes llama.cpp resize to a square as SigLIP's processor does, whatever the picture's shape.

    By itself ``mlp`` keeps the shape and pads. With candidates for a grid of tiles the whole view is stretched; the one
    of no size never wins, so that there are no tiles.
    """
    size = preprocessor.get("size") or {}
    return {"clip.vision.image_grid_pinpoints": [0, 0]} if "height" in size and "width" in size else {}


def _zero_biases(config: Any, names: Sequence[str]) -> dict[str, list[float]]:
    """llama.cpp adds the projector's biases whether there are any or not."""
    if any(name.endswith("multi_modal_projector.linear_1.bias") for name in names):
        return {}
    zeros = [0.0] * int(config.get_text_config().hidden_size)
    return {"mm.0.bias": zeros, "mm.2.bias": zeros}
