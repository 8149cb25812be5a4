"""Families whose tower takes pictures of several sizes in one row: exported for one picture, run for each.

What keeps pictures apart in such a tower (crops, a mask of blocks, positions by picture) is a loop over their sizes;
for one picture it is nothing, and the picture's size is the shape of its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from vlmexport.model.pictures import FRAMED, GRIDS, PIXELS, SIZES, STRIPPED, EachPicture
from vlmexport.split.features import FeatureCall
from vlmexport.split.looped import fixed_numbers, looped_pictures, one_looped, reads_sizes
from vlmexport.split.patches import grids, one_grid, takes_patches

Example = dict[str, torch.Tensor]


def takes_sizes(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> bool:
    """Is the model given pictures ``[pictures, channels, height, width]`` with their sizes, and nothing else?

    Or their patches with their grids, see `patches.takes_patches` and `looped.reads_sizes`.
    """
    if takes_patches(ask, example) or reads_sizes(ask, example):
        return True
    return ask.arguments.keys() == {PIXELS, SIZES} and example[PIXELS].ndim == len("NCHW")


def for_one_picture(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> FeatureCall:
    """`ask` for one picture without padding: its size is that of its pixels. `example` are inputs of `ask`."""
    if GRIDS in ask.arguments:
        return one_grid(ask)
    if {FRAMED, STRIPPED} & ask.arguments.keys():
        return one_looped(ask, example)

    def function(_owner: Any, **inputs: torch.Tensor) -> Any:
        size = tuple(inputs[ask.arguments[PIXELS]].shape[-2:])
        return ask.function(**inputs, **{ask.arguments[SIZES]: [size]})

    owner = getattr(ask.function, "__self__", None)
    return FeatureCall(MethodType(function, owner), {PIXELS: ask.arguments[PIXELS]})


def single_pictures(example: Mapping[str, torch.Tensor]) -> tuple[Example, ...]:
    """The pictures of `example`, each without its padding."""
    if GRIDS in example:
        return grids(example)
    if {FRAMED, STRIPPED} & example.keys():
        return looped_pictures(example)
    sizes = example[SIZES].tolist()
    return tuple({PIXELS: example[PIXELS][i : i + 1, :, :h, :w].contiguous()} for i, (h, w) in enumerate(sizes))


def joining(
    tensors: list[torch.Tensor], *, patches: bool, example: Mapping[str, torch.Tensor] | None = None
) -> EachPicture | None:
    """How features of single pictures are joined: along the one axis whose size depends on them; None if none.

    Those of grids of patches are joined as rows; `example` has what else the model is given with them.
    """
    first = tensors[0].shape
    if patches:
        if any(t.shape[-1] != first[-1] for t in tensors):
            return None
        return EachPicture(0, patches=True, fixed=fixed_numbers(example or {}))
    if any(len(t.shape) != len(first) for t in tensors):
        return None
    axes = {axis for t in tensors for axis, size in enumerate(t.shape) if size != first[axis]}
    return EachPicture(axes.pop()) if len(axes) == 1 else None


def joined(tensors: list[torch.Tensor], how: EachPicture) -> torch.Tensor:
    """`EachPicture.join` of tensors."""
    return torch.cat([t.flatten(0, -2) for t in tensors] if how.patches else tensors, dim=how.axis)


def takes_rows(projector: nn.Module, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Does `projector` make of the one tensor in `tensors` what it makes of its rows ``[rows, width]``?"""
    if len(tensors) != 1:
        return False
    with torch.no_grad():
        try:
            whole = projector(tensors[0])
            rows = projector(tensors[0].flatten(0, -2))
        except (RuntimeError, ValueError, IndexError, TypeError):  # it looks at axes that rows lack, or wants more
            return False
    return isinstance(rows, torch.Tensor) and torch.allclose(rows, whole.flatten(0, -2))
