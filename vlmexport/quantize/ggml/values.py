"""How weights of a PyTorch model become the tensors that llama.cpp reads, and back.

Every kind is a pair: `apply` gives the tensors of a weight, `invert` the weight of those tensors. Both take and give
torch tensors of any dtype and device (``meta`` too, for shapes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

_Forward: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]
_Backward: TypeAlias = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Kind:
    forward: _Forward
    backward: _Backward
    rows_only: bool = False  # it only moves whole output rows of one matrix, so codes can be moved as well


def apply(weight: torch.Tensor, kind: str | None, arguments: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:
    """The tensors that `weight` becomes; KeyError for an unknown `kind`. None leaves it alone."""
    return (weight,) if kind is None else _KINDS[kind].forward(weight, *arguments)


def invert(tensors: Sequence[torch.Tensor], kind: str | None, arguments: Sequence[int] = ()) -> torch.Tensor:
    """The weight that `apply` turned into `tensors` (all of them, in order)."""
    return tensors[0] if kind is None else _KINDS[kind].backward(*tensors, *arguments)


def moves_rows_only(kind: str | None) -> bool:
    """True when codes and scales ``[N, ...]`` may go through `apply` in place of the weight."""
    return kind is None or _KINDS[kind].rows_only


def _permute(weight: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Half-split rotary rows to interleaved ones, as llama.cpp's Llama-type rope reads them; ``[N, ...]``."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return (halves.transpose(1, 2).reshape(weight.shape),)


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _add_one(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A norm that multiplies by ``1 + w``; in float32, since 1 + a small number needs its bits."""
    return (weight.float() + 1,)


def _subtract_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() - 1


_KINDS: dict[str, _Kind] = {
    "permute": _Kind(_permute, _unpermute, rows_only=True),
    "add_one": _Kind(_add_one, _subtract_one),
}
