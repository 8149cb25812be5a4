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


def _split_rows(weight: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """`parts` equal blocks of output rows (fused query, key and value); ``[parts * N, ...]``."""
    return tuple(weight.chunk(parts, dim=0))


def _join_rows(*tensors_and_parts: torch.Tensor | int) -> torch.Tensor:
    return torch.cat([t for t in tensors_and_parts if isinstance(t, torch.Tensor)], dim=0)


def _split_frames(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A 3-D patch convolution ``[N, C, 2, h, w]`` as one 2-D convolution ``[N, C, h, w]`` for each of its frames."""
    return tuple(weight.unbind(dim=2))


def _join_frames(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.stack(tensors, dim=2)


def _patch_kernel(weight: torch.Tensor, patch: int, channels: int) -> tuple[torch.Tensor, ...]:
    """A linear layer on flat patches ``[N, patch * patch * channels]`` as a convolution ``[N, C, patch, patch]``."""
    return (weight.reshape(weight.shape[0], patch, patch, channels).permute(0, 3, 1, 2),)


def _flat_patches(tensor: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1).reshape(tensor.shape[0], patch * patch * channels)


def _squeeze_channel(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A depthwise 1-D convolution ``[N, 1, K]`` as a matrix ``[N, K]``."""
    return (weight.squeeze(1),)


def _unsqueeze_channel(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(1)


def _split_expert_rows(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Experts' fused gate and up projections ``[E, 2 * F, N]`` as two of ``[E, F, N]``."""
    return tuple(weight.chunk(2, dim=1))


def _join_expert_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.cat((gate, up), dim=1)


def _roll_rows(weight: torch.Tensor, shift: int) -> tuple[torch.Tensor, ...]:
    """Rows ``[..., N, C]`` moved down by `shift`, around the end: -1 puts the first one last."""
    return (weight.roll(shift, dims=-2),)


def _unroll_rows(tensor: torch.Tensor, shift: int) -> torch.Tensor:
    return tensor.roll(-shift, dims=-2)


def _row(weight: torch.Tensor, index: int) -> tuple[torch.Tensor, ...]:
    """One row of a table, ``[C]`` of ``[N, C]``; the table itself is not found again from it."""
    return (weight[index],)


def _no_table(tensor: torch.Tensor, index: int) -> torch.Tensor:
    raise ValueError(f"row {index} of a table does not say what the table is")


_KINDS: dict[str, _Kind] = {
    "permute": _Kind(_permute, _unpermute, rows_only=True),
    "add_one": _Kind(_add_one, _subtract_one),
    "roll_rows": _Kind(_roll_rows, _unroll_rows),
    "row": _Kind(_row, _no_table),
    "split_rows": _Kind(_split_rows, _join_rows, rows_only=True),
    "split_frames": _Kind(_split_frames, _join_frames),
    "patch_kernel": _Kind(_patch_kernel, _flat_patches),
    "squeeze_channel": _Kind(_squeeze_channel, _unsqueeze_channel),
    "split_expert_rows": _Kind(_split_expert_rows, _join_expert_rows),
}
