"""Root files of the ``transformersjs`` layout: what its loader reads beside the graphs, from the model's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmexport.dtypes import WEB_DTYPES
from vlmexport.families.transformersjs import WebFamily
from vlmexport.model.json_files import read_json_if_there

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

# What the client reads of the text model, which a checkpoint may leave to its config class's defaults.
_TEXT_KEYS = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
    "vocab_size", "layer_types",
)  # fmt: skip
_TOP_KEYS = ("model_type", "image_token_id", "image_token_index", "video_token_id", "vision_start_token_id")


def web_root_files(vlm: VLM, family: WebFamily, dtypes: tuple[str, ...], external: Mapping[str, int]) -> dict[str, str]:
    """Texts of config.json, preprocessor_config.json, processor_config.json and tokenizer_config.json by name.

    `dtypes` are the export's, the one to take by default first; `external` counts the data files of each graph file
    that has any.
    """
    processor = vlm.processor()
    files = {
        "config.json": _config(vlm, family, dtypes, external),
        "preprocessor_config.json": _preprocessor(processor, family),
        "processor_config.json": _processor(vlm, processor, family),
        "tokenizer_config.json": _tokenizer(vlm, processor),
    }
    return {name: json.dumps(body, indent=2, ensure_ascii=False) + "\n" for name, body in files.items()}


def _config(vlm: VLM, family: WebFamily, dtypes: tuple[str, ...], external: Mapping[str, int]) -> dict[str, Any]:
    """The model's config with ``transformers.js_config``, and what it leaves to the defaults of its class."""
    config = read_json_if_there(vlm.path / "config.json")
    whole = vlm.config.to_dict()
    config |= {key: whole[key] for key in _TOP_KEYS if config.get(key) is None and whole.get(key) is not None}
    if isinstance(whole.get("text_config"), dict):
        text = dict(config.get("text_config") or {})
        known = whole["text_config"]
        text |= {key: known[key] for key in _TEXT_KEYS if text.get(key) is None and known.get(key) is not None}
        text.pop("quantization_config", None)
        config["text_config"] = text
        if family.flat_config:
            config |= {
                key: known[key] for key in _TEXT_KEYS[1:] if config.get(key) is None and known.get(key) is not None
            }
    config.pop("quantization_config", None)
    halves = [name for name in WEB_DTYPES if WEB_DTYPES[name].decoder == "fp16"]
    config["transformers.js_config"] = {
        "dtype": dtypes[0],
        "kv_cache_dtype": dict.fromkeys(halves, "float16"),
        "use_external_data_format": dict(external),
    }
    return config


def _preprocessor(processor: Any, family: WebFamily) -> dict[str, Any]:
    """The image processor's settings, flat, with the names of the client's classes."""
    settings = json.loads(processor.image_processor.to_json_string())
    settings = {key: value for key, value in settings.items() if value is not None}
    length = getattr(processor, "image_seq_length", None)
    if isinstance(length, int):
        settings["image_seq_length"] = length
    if isinstance(patch := settings.get("patch_size"), dict):
        settings["patch_size"] = patch["height"]
    merge = getattr(processor, "spatial_merge_size", None)
    if isinstance(merge, int):
        settings |= {"spatial_merge_size": merge, "patch_size": int(processor.patch_size)}
    return {**settings, "image_processor_type": family.image_processor, "processor_class": family.processor}


def _processor(vlm: VLM, processor: Any, family: WebFamily) -> dict[str, Any]:
    """The processor's settings, in terms that the client's processor and the original one count alike."""
    settings = read_json_if_there(vlm.path / "processor_config.json") or json.loads(processor.to_json_string())
    settings["processor_class"] = family.processor
    if family.counts_all and getattr(processor, "vision_feature_select_strategy", None) == "default":
        # `default` takes one token off in Python and nothing in JavaScript; `full` takes nothing off in both.
        settings["num_additional_image_tokens"] = int(processor.num_additional_image_tokens) - 1
        settings["vision_feature_select_strategy"] = "full"
    return settings


def _tokenizer(vlm: VLM, processor: Any) -> dict[str, Any]:
    """The tokenizer's settings with the chat template inside: the client reads no other file for it."""
    settings = read_json_if_there(vlm.path / "tokenizer_config.json")
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return {**settings, "chat_template": template} if template else settings
