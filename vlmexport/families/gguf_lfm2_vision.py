"""The vision side of LFM2-VL in llama.cpp (b11549: tools/mtmd/models/siglip.cpp, mtmd-image.h)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require
from vlmexport.families.gguf_vision import encoder_rules, resampling, vision_metadata
from vlmexport.model.family import GgufHalf, Transform, linear

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
