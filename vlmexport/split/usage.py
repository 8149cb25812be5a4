"""Which parameters a computation depends on, read from autograd's graph: dead branches do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def parameters_behind(model: nn.Module, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[str, ...]:
    """Names, in the model's order, of the parameters of `model` that the tensors from `compute` depend on."""
    parameters = dict(model.named_parameters())
    frozen = [p for p in parameters.values() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        # No gradient is ever computed, so nothing needs to be saved for it: only the graph is wanted.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _t: None, _never):
            chosen = _Chosen()
            with chosen:
                reached = _leaves(compute())
            reached |= _leaves(tuple(chosen.behind))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return tuple(name for name, parameter in parameters.items() if id(parameter) in reached)


class _Chosen(TorchFunctionMode):
    """Keeps the tensors that whole numbers are chosen by (the place of a largest value), where gradients end."""

    def __init__(self) -> None:
        super().__init__()
        self.behind: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CHOICES:
            self.behind += [value for value in args if isinstance(value, torch.Tensor) and value.grad_fn is not None]
        return func(*args, **(kwargs or {}))


_CHOICES = frozenset({torch.argmin, torch.argmax, torch.Tensor.argmin, torch.Tensor.argmax})


def _leaves(tensors: tuple[torch.Tensor, ...]) -> set[int]:
    """Identities of the leaf tensors behind `tensors`."""
    found = {id(t) for t in tensors if t.grad_fn is None}
    todo: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    visited: set[Any] = set(todo)
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        fresh = [n for n, _ in node.next_functions if n is not None and n not in visited]
        visited.update(fresh)
        todo.extend(fresh)
    return found


def _never(_packed: object) -> torch.Tensor:
    raise RuntimeError("a gradient was asked for, but only the graph was recorded")
