"""What must be true of a model's folder before its weights are looked at, each with its own sentence when it is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.importers import check_method
from vlmexport.model.json_files import read_json
from vlmexport.model.lora_files import base_name, is_adapter
from vlmexport.model.remote import is_native, remote_name
from vlmexport.model.retrieval import retrieval_class

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "consolidated*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: its parsed ``config.json`` and its weight files, every one readable to its end."""

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The config's ``quantization_config``, of a method that an importer reads; None for float weights."""
        found: dict[str, Any] | None = quantization_config(self.config)
        return found

    @property
    def model_type(self) -> str:
        """The config's ``model_type``."""
        return str(self.config.get("model_type", ""))


def read_checkpoint(path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Check the folder `path`; raises `BadInputError` or `UnsupportedModelError` for the first thing wrong with it."""
    config = _read_config(path)
    check_architecture(path, config, trust_remote_code=trust_remote_code)
    return Checkpoint(path, config, _weight_files(path))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        if is_adapter(path):
            base = base_name(path) or "BASE"
            raise BadInputError(f"{path} is a LoRA adapter; give its base and merge it: --model {base} --lora {path}")
        raise BadInputError(f"{path} has no config.json; give the folder that `save_pretrained` wrote")
    config = read_json(file)
    if not config.get("model_type") and "auto_map" not in config:
        raise BadInputError(f"{file} has no model_type; it is not the config of a transformers model")
    return config


def check_architecture(path: Path, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a config that transformers cannot turn into a vision-language model, or quantized in an unknown way."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = str(config.get("model_type") or "")
    remote = config.get("auto_map") or {}
    native = is_native(config)
    if not native and remote and not trust_remote_code:
        raise UnsupportedModelError(
            f"{path}: {model_type or 'the model'} runs Python code that ships with it; read that code, then pass "
            "--trust-remote-code if you trust it"
        )
    if not native and remote_name(config) is None and retrieval_class(path) is None:
        if (
            model_type in CONFIG_MAPPING_NAMES
            and "vision_config" in transformers.CONFIG_MAPPING[model_type].sub_configs
        ):
            raise UnsupportedModelError(
                f"{path}: transformers has {model_type!r} in no class of models that take pictures and write text "
                "(AutoModelForImageTextToText); such models are not supported yet"
            )
        if model_type in CONFIG_MAPPING_NAMES:
            raise UnsupportedModelError(
                f"{path} is no vision-language model: transformers knows model_type {model_type!r} without images"
            )
        raise UnsupportedModelError(
            f"{path}: model_type {model_type!r} is unknown to transformers {transformers.__version__}"
        )
    if quantization := quantization_config(config):
        check_method(str(path), quantization)


def quantization_config(config: dict[str, Any]) -> Any:
    """What `config` (or its text part, where some tools write it) says of quantized weights; None for nothing."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    return config.get("quantization_config") or inner or None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` that says nothing of quantized weights, at any of the places `quantization_config` reads."""
    left = {key: value for key, value in config.items() if key != "quantization_config"}
    text = left.get("text_config")
    if isinstance(text, dict):
        left["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return left


def _weight_files(path: Path) -> tuple[Path, ...]:
    files = _listed_shards(path) or tuple(p for p in [path / WEIGHTS_NAME] if p.is_file())
    if not files:
        _refuse_missing_weights(path)
    for file in files:
        _check_safetensors(file)
    return files


def _listed_shards(path: Path) -> tuple[Path, ...]:
    index = path / INDEX_NAME
    if not index.is_file():
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{index} has no weight_map")
    shards = tuple(path / str(name) for name in sorted(set(weight_map.values())))
    for shard in shards:
        if not shard.is_file():
            raise BadInputError(
                f"{path}: the weight file {shard.name} is missing, one of {len(shards)} in {INDEX_NAME}"
            )
    return shards


def _refuse_missing_weights(path: Path) -> None:
    pickles = sorted(p.name for pattern in _PICKLE_PATTERNS for p in path.glob(pattern))
    if pickles:
        raise BadInputError(
            f"{path} has pickle weights only ({pickles[0]}); pickle can run any code, so it is never read: "
            "load the model where you trust it and call save_pretrained(folder, safe_serialization=True)"
        )
    raise BadInputError(f"{path} has no safetensors weights ({WEIGHTS_NAME} or {INDEX_NAME})")


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # Reads the header and compares the offsets in it with the file's size; no tensor is touched.
        with safe_open(file, framework="pt") as tensors:
            empty = not list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{file} is damaged or cut off: {error}; copy or download it again") from error
    if empty:
        raise BadInputError(f"{file} holds no tensors")


def check_loading(path: Path, info: dict[str, Any]) -> None:
    """Account for every tensor: refuse those that are missing, of another shape, or left over.

    `info` is what ``from_pretrained(output_loading_info=True)`` returned. transformers would fill the first two kinds
    with random numbers and drop the third without a word.
    """
    mismatched = [f"{name} is {_shape(got)} in the file, {_shape(want)} in the model" for name, got, want in
                  sorted(info.get("mismatched_keys", ()))]  # fmt: skip
    _refuse(path, "of the wrong shape", mismatched)
    _refuse(path, "missing from the files", sorted(info.get("missing_keys", ())))
    _refuse(path, "that have no place in the model", sorted(info.get("unexpected_keys", ())))
    _refuse(path, "that could not be loaded", [str(message) for message in info.get("error_msgs", ())])


def _refuse(path: Path, what: str, items: list[str]) -> None:
    if items:
        more = f" (and {len(items) - 1} more)" if len(items) > 1 else ""
        raise BadInputError(f"{path}: weights {what}: {items[0]}{more}")


def _shape(size: Any) -> str:
    return "x".join(map(str, size))
