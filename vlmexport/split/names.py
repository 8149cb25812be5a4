"""Whole-model names of modules and weights, found by identity and never by pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def module_path(model: nn.Module, module: nn.Module) -> str:
    """Dotted path of `module` inside `model` (``""`` for the model itself); KeyError when it is not inside."""
    for path, candidate in model.named_modules():
        if candidate is module:
            return str(path)
    raise KeyError(f"{type(module).__name__} is not a module of {type(model).__name__}")


def weight_names(model: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of `module` by its whole-model name.

    Found through module identity, so a weight that two modules share (a tied LM head) appears under the name it has in
    *this* module: ``lm_head.weight`` for the head although the table owns the storage.
    """
    paths = {id(m): path for path, m in model.named_modules()}
    found: dict[str, torch.Tensor] = {}
    for child in module.modules():
        if id(child) not in paths:  # wrappers of ours own no weights
            continue
        path = paths[id(child)]
        for local, parameter in child.named_parameters(recurse=False):
            found[f"{path}.{local}" if path else local] = parameter.detach()
    return found
