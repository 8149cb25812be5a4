"""A projector's call taken apart, and a projector that is only looked at while the encoder runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from vlmexport.split.packed import without_numbers


@dataclass(frozen=True)
class ProjectorCall:
    """How the projector is called: `spec` and `leaves` rebuild (args, kwargs); leaves that are None are tensors."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @property
    def tensors(self) -> int:
        """How many tensors the call has."""
        return sum(leaf is None for leaf in self.leaves)

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ProjectorCall, tuple[torch.Tensor, ...]]:
        """Take a call apart: its form, and its tensors in order."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        constants = tuple(None if isinstance(leaf, torch.Tensor) else _Constant(leaf) for leaf in leaves)
        return ProjectorCall(spec, constants), tensors

    def rebuild(self, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) of the call with `tensors` in their places."""
        supply = iter(tensors)
        leaves = [next(supply) if leaf is None else leaf.value for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass(frozen=True)
class _Constant:
    value: Any


class Absorber:
    """Stands for the features while the encoder is run: whatever is done to it gives an absorber.

    What a model does with its features after the projector (a list of rows, a split by counts read from a tensor) would
    otherwise be traced and fix the number of images.
    """

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> Absorber:
        return cls()

    def __getattr__(self, name: str) -> Absorber:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args: Any, **_kwargs: Any) -> Absorber:
        """Itself."""
        return self

    def __getitem__(self, _key: Any) -> Absorber:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter((self,))

    def __len__(self) -> int:
        return 1

    __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = __getitem__


@contextmanager
def intercepted(projector: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Within, calling `projector` keeps its arguments and computes nothing.

    From then on a traced tensor has no numbers: what is cut by them, the features of each picture, is not traced.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with ExitStack() as stack:

        def keep(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            stack.enter_context(without_numbers())
            return Absorber()

        projector.__dict__["forward"] = keep
        stack.callback(projector.__dict__.pop, "forward")
        yield calls
