"""What the vision halves of several families share: clip's keys and the names of a CLIP- or SigLIP-like encoder.

Facts from llama.cpp b11549: tools/mtmd/clip-impl.h (key and tensor names), tools/mtmd/clip.cpp (``load_hparams``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.family import MetaValue, TensorRule, linear


def vision_metadata(config: Any, projector: str) -> dict[str, MetaValue]:
    """The keys that clip reads of every vision encoder; `config` is the whole model's."""
    encoder = config.vision_config
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector,
        "clip.vision.projection_dim": int(config.get_text_config().hidden_size),
        "clip.vision.image_size": _side(encoder.image_size),
        "clip.vision.patch_size": _side(encoder.patch_size),
        "clip.vision.embedding_length": int(encoder.hidden_size),
        "clip.vision.feed_forward_length": int(encoder.intermediate_size),
        "clip.vision.block_count": int(encoder.num_hidden_layers),
        "clip.vision.attention.head_count": int(encoder.num_attention_heads),
    }


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def encoder_rules(block: str) -> tuple[TensorRule, ...]:
    """Rules of one CLIP or SigLIP block; `block` is its name with ``{i}``."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out",
        "layer_norm1": "ln1",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    }
    return tuple(linear(f"{block}.{source}", f"v.blk.{{i}}.{target}") for source, target in names.items())


def blocks_used(config: Any) -> int:
    """How many of the encoder's blocks the features pass through: ``vision_feature_layer`` of the whole config.

    -1 is all of them; -2 leaves the last one out. Raises `UnsupportedModelError` for several layers at once.
    """
    layer, blocks = _feature_layer(config), int(config.vision_config.num_hidden_layers)
    if isinstance(layer, list | tuple):
        if len(layer) != 1:
            raise UnsupportedModelError(
                f"{config.model_type}: vision_feature_layer is {list(layer)}; the features of one layer are supported"
            )
        layer = layer[0]
    return int(layer) if layer >= 0 else blocks + 1 + int(layer)


def _feature_layer(config: Any) -> Any:
    return getattr(config, "vision_feature_layer", -1)


def unused_blocks(config: Any, block: str) -> dict[str, str]:
    """Patterns of the blocks after the last one that features pass through; `block` is its name with ``{i}``."""
    layers = range(blocks_used(config), int(config.vision_config.num_hidden_layers))
    reason = f"vision_feature_layer is {_feature_layer(config)}: the features are taken before this block"
    return {f"{block.replace('{i}', str(layer))}.*": reason for layer in layers}


_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers


def resampling(preprocessor: Mapping[str, Any], model_type: str, default: str) -> str:
    """How the model's image processor resizes, `default` where it does not say.

    Raises `UnsupportedModelError` for what is none of PIL's numbers.
    """
    number = preprocessor.get("resample")
    if number is None:
        return default
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(_RESAMPLING):
        known = ", ".join(f"{i} {name}" for i, name in enumerate(_RESAMPLING))
        raise UnsupportedModelError(
            f"{model_type}: resample of its image processor is {number!r}, none of PIL's numbers ({known})"
        )
    return _RESAMPLING[number]


def resampling_notes(preprocessor: Mapping[str, Any], model_type: str, theirs: str) -> tuple[str, ...]:
    """A note where the model's image processor resizes by another method than llama.cpp's projector, `theirs`."""
    ours = resampling(preprocessor, model_type, theirs)
    if ours == theirs:
        return ()
    return (f"llama.cpp resizes pictures by {theirs} interpolation, the model's processor by {ours}",)
