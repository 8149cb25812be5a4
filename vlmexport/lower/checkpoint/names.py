"""Names of a model's weights in its checkpoint files, which need not be those of the PyTorch model."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.checkpoint.experts import Place, check_covered, find_rows
from vlmexport.model.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from vlmexport.checkpoint_plan import CheckpointPlan
    from vlmexport.model.load import VLM

_MATRIX_AXES = 2


@dataclass(frozen=True)
class Names:
    """Where each weight of the model is in the source's files.

    `in_files` maps a name in the model to the name in the files; `converted` are names in the files that transformers
    turns into something else while it loads, so that they have no one name in the model; `experts` are those of them
    that it packs into one parameter, with their place in it.
    """

    in_files: dict[str, str]
    converted: tuple[str, ...]
    experts: dict[str, Place] = field(default_factory=dict)

    def file_name(self, weight: str) -> str:
        """The name in the files; raises `UnsupportedModelError` for a weight that is not stored as it is used."""
        if weight not in self.in_files:
            raise UnsupportedModelError(
                f"{weight} is not in the model's files under a name of its own (transformers builds it while loading), "
                f"so its codes have no name that a loader would know; leave it alone with --keep '{weight}'"
            )
        return self.in_files[weight]

    def modules(self, weights: Iterable[str]) -> list[str]:
        """Module names of `weights`, as in the model and, where they differ, also as in the files; sorted."""
        weights = set(weights)
        packed = {key for key, rows in self.experts.items() if rows.weight in weights}
        found = {key.removesuffix(".weight") for key in packed}
        for weight in weights:
            found |= {weight.removesuffix(".weight"), self.in_files.get(weight, weight).removesuffix(".weight")}
        return sorted(found)

    def places(self, weights: Iterable[str]) -> dict[str, Place]:
        """What each tensor of the files is that holds one of `weights` or rows of it.

        Raises `UnsupportedModelError` as `file_name` does.
        """
        wanted = set(weights)
        found = {key: place for key, place in self.experts.items() if place.weight in wanted}
        packed = {place.weight for place in found.values()}
        return found | {self.file_name(name): Place(name) for name in wanted - packed}


def names_for(vlm: VLM, plan: CheckpointPlan) -> Names:
    """The names that a checkpoint needs; raises `UnsupportedModelError` for a planned weight without one."""
    names = read_names(vlm, read_checkpoint(vlm.path, trust_remote_code=vlm.trust_remote_code).weight_files)
    packed = [w.name for w in plan.weights if w.scheme is not None and len(w.shape) > _MATRIX_AXES]
    check_covered(vlm.model, packed, names.experts.values())
    names.places(plan.schemes)
    check_merged(vlm, names)
    return names


def check_merged(vlm: VLM, names: Names) -> None:
    """Refuse a merged adapter whose weights have no place in a copy of the source's files.

    Raises `UnsupportedModelError` for an LM head that is no longer tied to the embedding, and for a weight that
    transformers builds from several tensors.
    """
    if vlm.lora is None:
        return
    hint = "save the merged model by PEFT's merge_and_unload and save_pretrained, and quantize that"
    if vlm.lora.untied:
        raise UnsupportedModelError(
            f"{vlm.lora.source} changes the LM head or the embedding, which {vlm.source} ties: its files hold one "
            f"tensor for both; {hint}"
        )
    tied = {p.data_ptr() for n, p in vlm.model.named_parameters(remove_duplicate=False) if n in names.in_files}
    for name in vlm.lora.changed:
        if name not in names.in_files and vlm.model.get_parameter(name).data_ptr() not in tied:
            raise UnsupportedModelError(
                f"{vlm.lora.source} changes {name}, which transformers builds from several tensors of the files; {hint}"
            )


def read_names(vlm: VLM, files: Iterable[Path]) -> Names:
    """Map the names in `files` (safetensors) to the model's, by transformers' own conversion rules.

    A weight that came quantized goes by the name of the float weight that its tensors stand for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    model: Any = vlm.model
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    packed = {} if vlm.quantized is None else vlm.quantized.packed
    parts = {part for weight in packed.values() for part in weight.parts}
    in_files: dict[str, str] = {name: weight.name for name, weight in packed.items()}
    converted: dict[str, str] = {}
    for key, shape in stored_shapes(files):
        if key in parts:
            continue
        name, conversion = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if conversion is None and name in known and tuple(known[name].shape) == shape:
            in_files[name] = key
        else:
            converted[key] = name
    return Names(in_files, tuple(converted), find_rows(model, converted, stored_tensors(files, converted)))


def stored_shapes(files: Iterable[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in `files`, from their headers."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 -- safe_open is no mapping
                yield key, tuple(tensors.get_slice(key).get_shape())


def stored_tensors(files: Iterable[Path], only: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in `files` (or those named in `only`), one at a time, as stored."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 -- safe_open is no mapping
                if only is None or key in only:
                    yield key, tensors.get_tensor(key)
