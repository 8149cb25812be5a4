"""The image processor's settings, as a family's rules of its vision half read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError
from vlmexport.model.calling_transformers import quiet_transformers
from vlmexport.model.json_files import read_json, read_json_if_there

if TYPE_CHECKING:
    from vlmexport.model.load import VLM


def preprocessor_config(vlm: VLM) -> dict[str, Any]:
    """The image processor's settings with its class's own defaults for what the file leaves out.

    A class that cannot be loaded here (many need torchvision) adds nothing to the file. ``added_tokens`` are the ids of
    the tokenizer's added tokens by their text, which some vision halves need. Raises `BadInputError` when the model's
    folder has no settings, or broken ones.
    """
    written = _written(vlm.path)
    return {**written, **_completed(vlm, written), "added_tokens": _added_tokens(vlm.path)}


def _written(folder: Path) -> dict[str, Any]:
    """What the file says that transformers reads (image_processing_base.py, ``get_image_processor_dict``)."""
    file = folder / "processor_config.json"
    inner = read_json_if_there(file).get("image_processor")
    if inner is not None:
        if not isinstance(inner, dict):
            raise BadInputError(f"{file}: image_processor is {inner!r}, not a JSON object")
        return inner
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise BadInputError(
            f"{folder} has no preprocessor_config.json and no image_processor in a processor_config.json, so llama.cpp "
            "could not prepare images as it does; copy the model's file there"
        )
    return read_json(file)


def _completed(vlm: VLM, written: Mapping[str, Any]) -> dict[str, Any]:
    """What the processor's object says; empty where transformers cannot make one here."""
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(vlm.path, trust_remote_code=vlm.trust_remote_code)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return {}
    settings: dict[str, Any] = processor.to_dict()
    return {key: value for key, value in settings.items() if value is not None or key in written}


def _added_tokens(folder: Path) -> dict[str, int]:
    tokenizer = read_json_if_there(folder / "tokenizer.json")
    try:
        return {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{folder / 'tokenizer.json'}: added_tokens are damaged; restore the file") from error
