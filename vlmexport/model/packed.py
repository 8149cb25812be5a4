"""Load an already quantized checkpoint: its codes are kept, and the PyTorch model gets exactly what they mean.

The model is built from the config without its ``quantization_config`` and given the checkpoint's floats, with every
packed weight replaced by its dequantized codes. It is in float32, because no 16-bit type holds a code times its scale:
memory is four bytes for every weight, eight times a 4-bit checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.calling_transformers import clear_errors, quiet_transformers
from vlmexport.model.checkpoint import Checkpoint, check_loading
from vlmexport.model.importers import read_packed
from vlmexport.model.importers.packed import CodeFormat, LazyCodes, PackedCheckpoint, PackedWeight, QuantizedCheckpoint
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.model.remote import loading_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vlmexport.quantize.tensor import QuantizedTensor


def load_packed(checkpoint: Checkpoint, *, trust_remote_code: bool) -> tuple[PreTrainedModel, QuantizedCheckpoint, str]:
    """The model in float32, the codes by the model's own names, and the dtype of the checkpoint's floats.

    Raises `BadInputError` for tensors that are missing, left over or not what the config says, and
    `UnsupportedModelError` for a variant of the format whose codes cannot be kept.
    """
    with _named(checkpoint):
        stored = StoredTensors(checkpoint.weight_files)
        packed = read_packed(checkpoint.quantization or {}, stored)
        if not packed.weights:
            raise BadInputError(f"the config says {packed.method}, but no tensor is packed so")
        floats, formats = _decode_all(packed, stored)
    config = _float_config(checkpoint, trust_remote_code)
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    model, info = _build(config, {**_rest(packed, stored), **floats}, checkpoint, trust_remote_code)
    check_loading(checkpoint.path, {**info, "unexpected_keys": ()})
    with _named(checkpoint):
        names = _names_in_model(model, floats)
    empty = _empty_biases(info, names, stored)
    unexpected = [name for name in info.get("unexpected_keys", ()) if name not in empty]
    check_loading(checkpoint.path, {**info, "unexpected_keys": unexpected})
    biases = set(empty.values())
    weights = {names[w.name]: _with_bias(w, biases) for w in packed.weights}
    by_name = {names[name]: format_ for name, format_ in formats.items()}
    return model, QuantizedCheckpoint(packed.method, by_name, LazyCodes(weights), packed.notes, weights), dtype


@contextmanager
def _named(checkpoint: Checkpoint) -> Iterator[None]:
    """Put the folder in front of what an importer says of its tensors."""
    try:
        yield
    except BadInputError as error:
        raise type(error)(f"{checkpoint.path}: {error}") from error


def _decode_all(
    packed: PackedCheckpoint, stored: StoredTensors
) -> tuple[dict[str, torch.Tensor], dict[str, CodeFormat]]:
    """Every packed weight's float32 meaning and its format, by the checkpoint's names."""
    floats, formats = {}, {}
    for weight in packed.weights:
        codes = weight.decode()
        floats[weight.name] = codes.dequantize()
        formats[weight.name] = _format(codes, weight, packed.method, stored)
    return floats, formats


def _format(codes: QuantizedTensor, weight: PackedWeight, method: str, stored: StoredTensors) -> CodeFormat:
    codebook = "" if codes.codebook is None else "nf4" if method == "bitsandbytes" else "fp8"
    size = sum(stored.nbytes(part) for part in weight.parts)
    symmetric, wide = codes.zero_point is None, codes.scale.dtype == torch.float32
    return CodeFormat(codes.bits, codes.group_size, symmetric, codebook, codes.shape[1], size, wide)


def _rest(packed: PackedCheckpoint, stored: StoredTensors) -> dict[str, torch.Tensor]:
    """The tensors that no packed weight is made of."""
    consumed = {part for weight in packed.weights for part in weight.parts}
    return {name: stored[name] for name in stored if name not in consumed}


def _float_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    with clear_errors(checkpoint):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _build(
    config: PreTrainedConfig, state: dict[str, torch.Tensor], checkpoint: Checkpoint, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForImageTextToText, GenerationConfig

    with clear_errors(checkpoint), quiet_transformers():
        found = loading_class(checkpoint.path, trust_remote_code=trust_remote_code)
        if found is AutoModelForImageTextToText:
            with torch.device("meta"):
                found = type(found.from_config(config, trust_remote_code=trust_remote_code))
        model, info = found.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # reported in `info`, with both shapes, and refused there
            output_loading_info=True,
        )
        if (checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    return model, info


def _names_in_model(model: PreTrainedModel, floats: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The model's name of each weight in `floats`: the parameter that is the very tensor that was handed over.

    Found by storage, since transformers renames as it loads. One that it also cuts, stacks or permutes has codes of
    another order than its parameter, so it is refused.
    """
    places = {p.data_ptr(): (name, p) for name, p in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, tensor in floats.items():
        place, parameter = places.get(tensor.data_ptr(), ("", None))
        if parameter is None or parameter.shape != tensor.shape or parameter.stride() != tensor.stride():
            raise UnsupportedModelError(
                f"{name}: {type(model).__name__} has no weight of this name and order (it is renamed and reshaped, or "
                "has no place), so its codes cannot be kept; give the original weights"
            )
        found[name] = place
    return found


def _empty_biases(info: dict[str, Any], names: Mapping[str, str], stored: StoredTensors) -> dict[str, str]:
    """The all-zero biases that AutoGPTQ writes for layers that have none: name in the model to name in the files."""
    sources = {
        f"{name.removesuffix('weight')}bias": f"{source.removesuffix('weight')}bias" for source, name in names.items()
    }
    found = [u for u in info.get("unexpected_keys", ()) if u in sources and not stored[sources[u]].any()]
    return {name: sources[name] for name in found}


def _with_bias(weight: PackedWeight, biases: set[str]) -> PackedWeight:
    """`weight` with the empty bias that was written beside it as one of its parts: it has no other meaning."""
    bias = f"{weight.name.removesuffix('weight')}bias"
    return dataclasses.replace(weight, parts=(*weight.parts, bias)) if bias in biases else weight
