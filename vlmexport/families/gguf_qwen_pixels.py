"""What llama.cpp does with the pictures of a Qwen model (b11549: tools/mtmd/clip.cpp)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmexport.families.gguf_vision import resampling_notes
from vlmexport.model.family import MetaValue

# The most tokens of a picture; Qwen2-VL's towers are compiled with it in llama.cpp (clip.cpp, qwen2vl.cpp).
_MOST_TOKENS = 4096


def pixel_notes(config: Any, preprocessor: Mapping[str, Any]) -> tuple[str, ...]:
    """What llama.cpp does to a picture that the model's processor does not."""
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


def pixel_limits(config: Any, preprocessor: Mapping[str, Any]) -> dict[str, MetaValue]:
    """The model's own limits of a picture's size, which llama.cpp takes in place of its 8 to 4096 tokens.

    The upper one is kept at llama.cpp's 4096 tokens: Qwen2.5's window mask is the square of the patches in memory.
    """
    least, most = _pixel_range(preprocessor)
    return {
        "clip.vision.image_min_pixels": least,
        "clip.vision.image_max_pixels": min(most, _MOST_TOKENS * _token_side(config) ** 2),
    }
