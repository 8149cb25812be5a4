"""The matrices of a module that ``torch.nn.functional.linear`` multiplies by: observed while it runs, never guessed.

Every product is seen together with the address of its weight, so plain linear layers, routers that multiply by a bare
parameter, and the experts packed in one 3-D parameter are found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

PACKED_AXES = 3


@dataclass(frozen=True)
class Matrix:
    """One matrix ``[N, K]``: a 2-D parameter, or expert number `expert` of a packed one ``[E, N, K]``.

    `parameter` is the parameter's name; `name` the same, with ``.<expert>`` appended for an expert.
    """

    name: str
    parameter: str
    expert: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrix itself, a view of `parameter`."""
        return parameter if self.expert is None else parameter[self.expert]


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Is `module` a linear layer that computes what `torch.nn.Linear` does, whatever its class?"""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def matrices_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> list[Matrix]:
    """The matrices among named parameters, in their order."""
    found: list[Matrix] = []
    for name, parameter in parameters:
        if parameter.ndim == PACKED_AXES - 1:
            found.append(Matrix(name, name))
        elif parameter.ndim == PACKED_AXES:
            found += [Matrix(f"{name}.{e}", name, e) for e in range(parameter.shape[0])]
    return found


class LinearObserver(TorchFunctionMode):
    """Within, `take(matrix, inputs)` is called for every linear product with one of `matrices`."""

    def __init__(
        self,
        matrices: Iterable[Matrix],
        parameters: Mapping[str, torch.Tensor],
        take: Callable[[Matrix, torch.Tensor], None],
    ) -> None:
        super().__init__()
        self._take = take
        self._by_address: dict[tuple[int, torch.Size], Matrix] = {}
        for matrix in matrices:
            weight = matrix.of(parameters[matrix.parameter])
            self._by_address[weight.data_ptr(), weight.shape] = matrix

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at calls of ``linear``; everything runs as it would."""
        if func is nn.functional.linear:
            x, weight = _linear_operands(*args, **(kwargs or {}))
            matrix = self._by_address.get((weight.data_ptr(), weight.shape))
            if matrix is not None:
                self._take(matrix, x)
        return func(*args, **(kwargs or {}))


def _linear_operands(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    del bias
    return input, weight
