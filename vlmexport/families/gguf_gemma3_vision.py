"""The vision side of Gemma 3 in llama.cpp (b11549: tools/mtmd/models/siglip.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_vision import encoder_rules, resampling_notes, vision_metadata
from vlmexport.model.family import GgufHalf, TensorRule, Transform, linear

_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ADD_ONE = Transform("add_one")


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of the SigLIP tower with Gemma's projector.

    Raises `UnsupportedModelError` for an activation or an image treatment that llama.cpp does not have.
    """
    del names
    encoder = config.vision_config
    require(encoder, "hidden_act", _GELU_TANH, "llama.cpp's encoder has GELU by its tanh formula")
    if encoder.hidden_size == encoder.intermediate_size:
        raise UnsupportedModelError(
            f"{config.model_type}: the vision MLP is as wide as the tower ({encoder.hidden_size}), which llama.cpp "
            "takes for a file with its two matrices swapped"
        )
    if preprocessor.get("do_pan_and_scan"):
        raise UnsupportedModelError(
            f"{config.model_type}: do_pan_and_scan adds cut-outs of long pictures, but llama.cpp shows them whole"
        )
    metadata = {
        **vision_metadata(config, "gemma3"),
        **pixel_statistics(preprocessor, config.model_type),
        "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": float(encoder.layer_norm_eps),
        "clip.vision.projector.scale_factor": _pool_side(config),
    }
    tower, projector = "model.vision_tower", "model.multi_modal_projector"
    rules = (
        *encoder_rules(f"{tower}.encoder.layers.{{i}}"),
        linear(f"{tower}.embeddings.patch_embedding", "v.patch_embd"),
        linear(f"{tower}.embeddings.position_embedding", "v.position_embd"),
        linear(f"{tower}.post_layernorm", "v.post_ln"),
        TensorRule(f"{projector}.mm_input_projection_weight", ("mm.input_projection.weight",), whole=True),
        linear(f"{projector}.mm_soft_emb_norm", "mm.soft_emb_norm", _ADD_ONE),
    )
    side = int(encoder.image_size)
    return GgufHalf(
        "gemma3",
        rules,
        metadata,
        notes=(
            "llama.cpp gives a picture that is not square black edges, where the model's processor stretches it: make "
            f"pictures {side} x {side} pixels for the same answers",
            *resampling_notes(preprocessor, config.model_type, "bilinear"),
        ),
        unused={f"{tower}.head.*": "the tower's pooling head, which the language model does not read"},
        # llama.cpp transposes the projection when it runs, which blocks of a quantized type cannot be.
        always_f32=("v.patch_embd.weight", "v.position_embd.weight", "mm.input_projection.weight"),
    )


def _pool_side(config: Any) -> int:
    """Patches of one side that become one token."""
    side = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
    tokens = int(config.mm_tokens_per_image**0.5)
    if tokens**2 != config.mm_tokens_per_image or side % tokens:
        raise UnsupportedModelError(
            f"{config.model_type}: mm_tokens_per_image is {config.mm_tokens_per_image}, but llama.cpp pools {side} x "
            f"{side} patches by squares"
        )
    return side // tokens
