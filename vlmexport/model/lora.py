"""Merge a LoRA adapter into a loaded model, vision and text modules alike.

``W + scaling * B @ A`` is computed in float32 and rounded once to the checkpoint's dtype; changed parameters are new
tensors, all others stay memory-mapped. DoRA (arXiv 2402.09353) multiplies each row of the sum by its magnitude over its
norm. Where a checkpoint ties the LM head to the embedding and the adapter changes one of the two, they are tied no
longer, as in training: PEFT adapts modules, not the tensor that they share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from vlmexport.errors import BadInputError
from vlmexport.model.lora_files import AdaptedModule, Adapter
from vlmexport.model.lora_names import ParameterNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Edit: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
_MATRIX_AXES = 2
MERGE_INSTEAD = "merge the adapter into an export by --lora"


@dataclass(frozen=True)
class MergedAdapter:
    """What was merged: `source` is what the user typed, `files` the adapter's config and weights.

    `changed` are the parameters (by every name that they have in the model) that differ from the base's; `untied` is
    True when the LM head and the embedding no longer share a tensor. `notes` are for people.
    """

    source: str
    path: Path
    files: tuple[Path, ...]
    changed: tuple[str, ...]
    untied: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LowRank:
    """The update of one matrix, ``scaling * b @ a``, in float32: `a` ``[r, in]``, `b` ``[out, r]``.

    Of an embedding (`embedding`) `a` is ``[r, rows]``, `b` ``[columns, r]`` and the product is transposed.
    """

    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    embedding: bool = False


def merge_adapter(model: PreTrainedModel, adapter: Adapter, base: str = "") -> MergedAdapter:
    """Merge `adapter` into `model` in place; `base` is what the user called the model.

    Raises `BadInputError` for a tensor that has no place in the model or another shape than it (naming both), and for
    a merged weight that its dtype cannot hold. Every tensor of the adapter is used.
    """
    places = _places(ParameterNames(model), adapter)
    whole: Any = model
    tied = _tied_names(whole)
    changed = {}
    for name, edits in _edits(whole, adapter, places, tied).items():
        parameter = whole.get_parameter(name)
        value = parameter
        for edit in edits:
            value = edit(value)
        value = _rounded(name, value, parameter)  # before the next one: only one is held in float32
        if not torch.equal(value, parameter):
            changed[name] = value
    untied = _install(whole, changed, tied)
    return MergedAdapter(
        adapter.source, adapter.path, adapter.files, tuple(sorted(changed)), untied, _notes(adapter, base)
    )


def low_rank_updates(model: PreTrainedModel, adapter: Adapter) -> dict[str, LowRank]:
    """The adapter's updates of matrices by the model's parameter names, nothing merged.

    Raises `BadInputError` as `merge_adapter` does, and for an adapter that does more than add low-rank matrices.
    """
    names = _places(ParameterNames(model), adapter)
    whole: Any = model
    known = dict(whole.named_parameters(remove_duplicate=False))
    for name, tensor in adapter.whole.items():
        base = known[names[name]]
        same = tensor.shape == base.shape and torch.equal(tensor.to(base.dtype), base)
        if not same:
            raise BadInputError(
                f"{adapter.path}: {name} is replaced altogether, which is no low-rank update; {MERGE_INSTEAD}"
            )
    found = {}
    for module in adapter.modules.values():
        found[names[f"{module.name}.weight"]] = _low_rank(whole, adapter, module, names)
    return found


def _low_rank(model: Any, adapter: Adapter, module: AdaptedModule, names: Mapping[str, str]) -> LowRank:
    for what, tensor in (("DoRA magnitudes", module.magnitude), ("a bias", module.bias), ("whole rows", module.tokens)):
        if tensor is not None:
            raise BadInputError(
                f"{adapter.path}: {module.name} has {what}, which is no low-rank update; {MERGE_INSTEAD}"
            )
    name = names[f"{module.name}.weight"]
    a, b = _pair(module)
    _same_shape(adapter, module.name, _delta(model, module, name), name, model.get_parameter(name))
    return LowRank(name, a, b, adapter.config.scaling(module.name), module.embedding)


def _places(names: ParameterNames, adapter: Adapter) -> dict[str, str]:
    """The model's parameter for every weight and bias that the adapter names; two may not mean the same."""
    asked = [*adapter.whole, *(f"{m.name}.weight" for m in adapter.modules.values())]
    asked += [f"{m.name}.bias" for m in adapter.modules.values() if m.bias is not None]
    found: dict[str, str] = {}
    for name in asked:
        try:
            found[name] = names.find(name)
        except BadInputError as error:
            raise BadInputError(f"{adapter.path}: {error}") from error
    back: dict[str, str] = {}
    for name, place in found.items():
        if back.setdefault(place, name) != name:
            raise BadInputError(f"{adapter.path}: {back[place]} and {name} would both change {place}")
    return found


def _edits(
    model: Any, adapter: Adapter, places: Mapping[str, str], tied: Mapping[str, tuple[str, ...]]
) -> dict[str, list[_Edit]]:
    """What is done to each parameter, in order: replaced, then adapted, then given new rows."""
    found: dict[str, list[_Edit]] = defaultdict(list)
    for name, tensor in adapter.whole.items():
        place = places[name]
        _same_shape(adapter, name, tensor, place, model.get_parameter(place))
        found[place].append(partial(_replaced, tensor))
    for module in (m for m in adapter.modules.values() if m.a is not None):
        place = places[f"{module.name}.weight"]
        found[place].append(partial(_adapted, model, adapter, module, place))
        if module.bias is not None:
            bias = places[f"{module.name}.bias"]
            _same_shape(adapter, f"{module.name}.lora_B.bias", module.bias, bias, model.get_parameter(bias))
            found[bias].append(partial(_added, module.bias, adapter.config.scaling(module.name)))
    for module in (m for m in adapter.modules.values() if m.tokens is not None):
        place = places[f"{module.name}.weight"]
        for name in tied.get(place, (place,)):
            found[name].append(partial(_with_rows, adapter, module, name))
    return found


def _replaced(tensor: torch.Tensor, _value: torch.Tensor) -> torch.Tensor:
    return tensor


def _added(tensor: torch.Tensor, scaling: float, value: torch.Tensor) -> torch.Tensor:
    return value.float() + scaling * tensor.float()


def _adapted(model: Any, adapter: Adapter, module: AdaptedModule, name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` with one module's low-rank update, scaled to its magnitudes where it has them."""
    delta = _same_shape(adapter, module.name, _delta(model, module, name), name, value)
    made = _added(delta, adapter.config.scaling(module.name), value)
    return made if module.magnitude is None else _with_magnitude(adapter, module, made)


def _pair(module: AdaptedModule) -> tuple[torch.Tensor, torch.Tensor]:
    if module.a is None or module.b is None:
        raise ValueError(f"{module.name} has no pair of matrices")  # `read_adapter` has seen to that
    return module.a.float(), module.b.float()


def _delta(model: Any, module: AdaptedModule, name: str) -> torch.Tensor:
    """``B @ A`` in the layout of the weight `name`: transposed for embeddings and GPT-2's Conv1D, 4-D for patches."""
    from transformers.pytorch_utils import Conv1D

    a, b = _pair(module)
    product = b.flatten(1) @ a.flatten(1)
    if module.embedding or isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
        return product.T
    return product.reshape(b.shape[0], *a.shape[1:]) if a.ndim > _MATRIX_AXES else product


def _with_magnitude(adapter: Adapter, module: AdaptedModule, value: torch.Tensor) -> torch.Tensor:
    """DoRA: every output row of `value` (of an embedding: every column) scaled to the norm that was learned for it."""
    axes = (0,) if module.embedding else tuple(range(1, value.ndim))
    norm: torch.Tensor = torch.linalg.vector_norm(value, dim=axes, keepdim=True)
    magnitude = (module.magnitude if module.magnitude is not None else norm).float()
    if magnitude.numel() != norm.numel():
        raise BadInputError(
            f"{adapter.path}: {module.name} has {magnitude.numel()} magnitudes, the model's has {norm.numel()} rows"
        )
    return value * (magnitude.reshape(norm.shape) / norm)


def _with_rows(adapter: Adapter, module: AdaptedModule, name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` with the rows of ``trainable_token_indices`` replaced."""
    settings, rows = adapter.config.token_indices, module.tokens
    ends = [end for end in settings if not end or f".{module.name}".endswith(f".{end}")]
    indices = list(settings[ends[0]]) if ends else []
    found = () if rows is None else tuple(rows.shape)
    if rows is None or found != (len(indices), value.shape[1]) or not all(0 <= i < value.shape[0] for i in indices):
        raise BadInputError(
            f"{adapter.path}: {module.name} has {'x'.join(map(str, found))} values for its rows {indices}, "
            f"{name} of the model is {'x'.join(map(str, value.shape))}"
        )
    made = value.float().clone()
    made[indices] = rows.float()
    return made


def _same_shape(adapter: Adapter, what: str, tensor: torch.Tensor, name: str, parameter: torch.Tensor) -> torch.Tensor:
    if tensor.shape != parameter.shape:
        mine, theirs = ("x".join(map(str, t.shape)) for t in (tensor, parameter))
        raise BadInputError(
            f"{adapter.path}: {what} is {mine}, {name} of the model is {theirs}; the adapter is for another base"
            + (" (or the vocabulary was resized: save the merged model with PEFT then)" if "embed" in what else "")
        )
    return tensor


def _rounded(name: str, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    made = value.to(parameter.dtype).contiguous()
    if not made.isfinite().all():
        raise BadInputError(
            f"{name} with the adapter merged does not fit {str(parameter.dtype).removeprefix('torch.')}"
        )
    return made


def _tied_names(model: Any) -> dict[str, tuple[str, ...]]:
    """For every parameter with several names: all of them."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _install(model: Any, changed: Mapping[str, torch.Tensor], tied: Mapping[str, tuple[str, ...]]) -> bool:
    """Put the changed parameters into the model; True when names that shared a tensor no longer do."""
    untied = False
    made: dict[str, torch.nn.Parameter] = {}
    for name, value in changed.items():
        group = tied.get(name, (name,))
        twin = next((o for o in group if o in made and torch.equal(made[o], value)), None)
        made[name] = made[twin] if twin else torch.nn.Parameter(value, requires_grad=False)
        untied |= not all(o in changed and torch.equal(changed[o], value) for o in group)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, made[name])
    if untied:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return untied


def _notes(adapter: Adapter, base: str) -> tuple[str, ...]:
    named = adapter.config.base_model
    if not named or not base or _last(named) == _last(base):
        return ()
    return (f"{adapter.source} names {named} as its base; it was merged into {base}",)


def _last(name: str) -> str:
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
