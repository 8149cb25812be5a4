"""Root files of the ``genai`` layout: what onnxruntime-genai reads beside the graphs, from the model's own settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.genai import GenaiFamily
from vlmexport.model.json_files import read_json_if_there
from vlmexport.split.parts import Role

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

CONFIG = "genai_config.json"
# Not processor_config.json, which is the name of the model's own file.
PROCESSOR = "genai_processor.json"
# The runtime allocates the whole cache at once, for as many tokens as may be asked for: callers raise it.
MAX_LENGTH = 4096
# A token that no text has, for models whose padding is a token of their prompts: the runtime masks every one of it.
_NO_TOKEN = -1
_FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


def genai_root_files(vlm: VLM, family: GenaiFamily, split: Split, files: Mapping[Role, str]) -> dict[str, str]:
    """Texts of genai_config.json and of the image processor's settings by name; `files` are the graphs by role.

    Raises `UnsupportedModelError` for an image processor whose steps the runtime has no words for.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    # Not the processor of both, which may want packages for videos.
    tokenizer, image = (
        loader.from_pretrained(vlm.path, trust_remote_code=vlm.trust_remote_code)
        for loader in (AutoTokenizer, AutoImageProcessor)
    )
    bodies = {
        CONFIG: {"model": _model(vlm, family, split, files, tokenizer), "search": _search(vlm)},
        PROCESSOR: {"processor": {"name": "image_processor", "transforms": _transforms(vlm, image)}},
    }
    return {name: json.dumps(body, indent=2) + "\n" for name, body in bodies.items()}


def _model(vlm: VLM, family: GenaiFamily, split: Split, files: Mapping[Role, str], tokenizer: Any) -> dict[str, Any]:
    config, text = vlm.config.to_dict(), _text(vlm)
    vision, kv = config["vision_config"], split.kv
    tokens = ("video_token_id", "vision_start_token_id")
    positions = {"position_ids": "position_ids"} if "position_ids" in split.merge.extras else {}
    pixels = {spec.name: spec.name for spec in split.parts[Role.VISION_ENCODER].signature.inputs}
    return {
        "type": family.runs_as,
        "bos_token_id": _first(text.get("bos_token_id"), tokenizer.bos_token_id, 0),
        "eos_token_id": list(vlm.facts.eos_token_ids),
        "pad_token_id": _padding(tokenizer),
        "image_token_id": split.merge.image_token_id,
        **{name: config[name] for name in tokens if config.get(name) is not None},
        "vocab_size": vlm.facts.vocab_size,
        "context_length": _context(vlm),
        "decoder": {
            "filename": files[Role.DECODER],
            "session_options": _SESSION,
            "hidden_size": vlm.facts.hidden_size,
            "head_size": kv.head_dim,
            "num_attention_heads": text["num_attention_heads"],
            "num_hidden_layers": kv.layers,
            "num_key_value_heads": kv.heads,
            "inputs": {
                "inputs_embeds": "inputs_embeds",
                "attention_mask": "attention_mask",
                **positions,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
        "embedding": {
            "filename": files[Role.EMBEDDING],
            "session_options": _SESSION,
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": files[Role.VISION_ENCODER],
            "config_filename": PROCESSOR,
            "session_options": _SESSION,
            "spatial_merge_size": split.merge.spatial_merge_size,
            "patch_size": vision["patch_size"],
            **({} if vision.get("tokens_per_second") is None else {"tokens_per_second": vision["tokens_per_second"]}),
            "inputs": pixels,
            "outputs": {"image_features": "image_features"},
        },
    }


_SESSION: Mapping[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}


def _search(vlm: VLM) -> dict[str, Any]:
    """Greedy, unless the model's own generation config samples; the cache is written in place."""
    own = read_json_if_there(vlm.path / "generation_config.json")
    sampling: dict[str, Any] = {
        name: own[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty") if name in own
    }
    return {
        "do_sample": bool(own.get("do_sample", False)),
        "max_length": min(MAX_LENGTH, _context(vlm)),
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
        **sampling,
    }


def _transforms(vlm: VLM, image: Any) -> list[dict[str, Any]]:
    """The image processor's steps in the words of onnxruntime-extensions: resize to whole patches, scale, cut."""
    skipped = [name for name in _STEPS if getattr(image, name, True) is False]
    if skipped or image.resample not in _FILTERS:
        what = f"{skipped[0]}=False" if skipped else f"resample={image.resample}"
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: no genai layout: onnxruntime-genai has no image processor with {what}"
        )
    least, most = _pixels(image)
    grid = {"patch_size": image.patch_size, "merge_size": image.merge_size}
    side = image.patch_size * image.merge_size
    resize = {"width": side, "height": side, "smart_resize": 1, "min_pixels": least, "max_pixels": most, **grid,
              "interpolation": _FILTERS[int(image.resample)]}  # fmt: skip
    return [
        _step("decode_image", "DecodeImage", color_space="RGB"),
        _step("resize", "Resize", **resize),
        _step("rescale", "Rescale", rescale_factor=float(image.rescale_factor)),
        _step("normalize", "Normalize", mean=list(image.image_mean), std=list(image.image_std)),
        _step("patch_image", "PatchImage", temporal_patch_size=image.temporal_patch_size, **grid),
    ]


def _step(name: str, kind: str, **attributes: Any) -> dict[str, Any]:
    return {"operation": {"name": name, "type": kind, "attrs": attributes}}


def _pixels(image: Any) -> tuple[int, int]:
    """The fewest and the most pixels of a resized picture."""
    size = image.size
    return int(size["shortest_edge"]), int(size["longest_edge"])


def _padding(tokenizer: Any) -> int:
    """The tokenizer's padding, unless a prompt may hold it."""
    padding = tokenizer.pad_token_id
    if padding is None:
        return _NO_TOKEN
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else "a"
    used = tokenizer(text)["input_ids"]
    return _NO_TOKEN if padding in used else int(padding)


def _context(vlm: VLM) -> int:
    return int(_text(vlm)["max_position_embeddings"])


def _text(vlm: VLM) -> dict[str, Any]:
    config: dict[str, Any] = vlm.config.get_text_config().to_dict()
    return config


def _first(*values: int | list[int] | None) -> int:
    found = next(value for value in values if value is not None)
    return found[0] if isinstance(found, list) else found
