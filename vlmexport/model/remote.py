"""Models whose Python code ships with their checkpoint: which class to load, and what it lacks for the generic split.

Code of a checkpoint runs only where the user said so (``--trust-remote-code``): every function here that imports it is
called with that flag alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import UnsupportedModelError, VlmExportError
from vlmexport.model.json_files import read_json_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a config's ``auto_map`` may name its model under, the most fitting first. AutoModelForVision2Seq is gone from
# transformers 5, the checkpoints that name it are not.
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
NEEDED = (
    "vlmexport needs get_image_features(), get_decoder(), get_input_embeddings(), get_output_embeddings() and an image "
    "token id"
)
_TOKEN_NAMES = ("image_token_id", "image_token_index")
_CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# transformers 5 sets it in post_init(), and cannot load a class that never calls that.
_SET_BY_POST_INIT = "all_tied_weights_keys"
_MODULES = "transformers_modules"


def remote_name(config: dict[str, Any]) -> str | None:
    """Which auto class of `config`'s ``auto_map`` names the model; None when none does that writes text."""
    named = config.get("auto_map") or {}
    return next((name for name in AUTO_CLASSES if name in named), None)


def is_remote(model: Any) -> bool:
    """Is the class of `model` code that shipped with a checkpoint?"""
    return type(model).__module__.split(".")[0] == _MODULES


def is_native(config: dict[str, Any]) -> bool:
    """Does transformers itself have a vision-language model for the ``model_type`` of `config`?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.get("model_type", "") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def loading_class(path: Path, *, trust_remote_code: bool) -> Any:
    """The class whose ``from_pretrained`` loads the checkpoint in `path`: transformers' auto class, or a remote one.

    No code of the checkpoint is imported without `trust_remote_code`, nor where transformers has the model itself.
    Raises `UnsupportedModelError` naming all that a remote class lacks for the generic split, before weights are read.
    """
    from transformers import AutoModelForImageTextToText

    config = read_json_if_there(path / "config.json")
    name = remote_name(config)
    if not trust_remote_code or name is None or is_native(config):
        return AutoModelForImageTextToText
    return _remote_class(path, str(config["auto_map"][name]))


def _remote_class(path: Path, reference: str) -> Any:
    import torch
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with running_remote_code(path):
        found: Any = get_class_from_dynamic_module(reference, str(path), local_files_only=True)
        config = AutoConfig.from_pretrained(path, trust_remote_code=True, local_files_only=True)
        with torch.device("meta"):
            empty = found(config)
    require_accessors(empty, path)
    return found


@contextmanager
def running_remote_code(path: Path) -> Iterator[None]:
    """What code of a checkpoint raises, as `UnsupportedModelError` of one line that names the folder."""
    import transformers

    try:
        yield
    except VlmExportError:
        raise
    except Exception as error:  # code that we do not know raises anything
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{path}: its remote code fails with transformers {transformers.__version__}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def require_accessors(model: PreTrainedModel, path: Path) -> None:
    """Refuse a remote class that the generic split cannot ask for its parts; one line says all that it lacks."""
    if missing := missing_accessors(model):
        listed = missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}"
        raise UnsupportedModelError(
            f"{path}: the model class {type(model).__name__} of remote code has {listed}; {NEEDED}"
        )


def missing_accessors(model: Any) -> list[str]:
    """What `model` lacks for the generic split, each as words behind "has"; it is not run, and may have no memory."""
    missing = (
        [] if hasattr(model, _SET_BY_POST_INIT) else ["no post_init() in its __init__ (transformers 5 loads no such)"]
    )
    base = getattr(model, "base_model", model)
    if not any(hasattr(owner, "get_image_features") for owner in (model, base)):
        missing.append("no get_image_features()")
    if "input_ids" not in inspect.signature(model.forward).parameters:
        missing.append("no input_ids in its forward()")
    missing += _missing_of_decoder(model)
    missing += [
        f"no {name}()" for name in ("get_input_embeddings", "get_output_embeddings") if not _weight(model, name)
    ]
    return missing + _missing_token(model.config)


def _missing_of_decoder(model: Any) -> list[str]:
    decoder = _asked(model, "get_decoder")
    if decoder is None or decoder is model or not hasattr(decoder, "get_decoder") or not hasattr(decoder, "config"):
        return ["no get_decoder() that gives a text model of transformers"]
    if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        return ["no inputs_embeds in the forward() of its decoder"]
    return []


def _weight(model: Any, name: str) -> bool:
    return hasattr(_asked(model, name), "weight")


def _asked(model: Any, name: str) -> Any:
    """What the accessor `name` of `model` gives; None where there is none, or it says that it has nothing."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _missing_token(config: Any) -> list[str]:
    found = {name: value for name in _TOKEN_NAMES if (value := getattr(config, name, None)) is not None}
    if not found:
        return [f"no image token id in its config ({' or '.join(_TOKEN_NAMES)})"]
    name, value = next(iter(found.items()))
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if value < 0 or (vocabulary is not None and value >= vocabulary):
        return [f"an image token id ({name} {value}) that is no row of its embeddings ({vocabulary})"]
    return []


def code_files(path: Path) -> dict[str, Path]:
    """The Python files of the checkpoint in `path`, by name, where one of its configs names code; else none."""
    named = any("auto_map" in read_json_if_there(path / name) for name in _CONFIGS)
    return {file.name: file for file in sorted(path.glob("*.py"))} if named else {}


def names_processor_code(path: Path) -> bool:
    """Does the processor (or tokenizer) in `path` run code that ships with it?"""
    for name in _CONFIGS:
        named = read_json_if_there(path / name).get("auto_map") or {}
        if any(key in named for key in ("AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoVideoProcessor")):
            return True
    return False
