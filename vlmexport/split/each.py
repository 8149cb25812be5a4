"""Families whose tower takes pictures of several sizes in one row: exported for one picture, run for each.

What keeps pictures apart in such a tower (crops, a mask of blocks, positions by picture) is a loop over their sizes;
for one picture it is nothing, and the picture's size is the shape of its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

from vlmexport.model.pictures import PIXELS, SIZES, EachPicture
from vlmexport.split.features import FeatureCall

Example = dict[str, torch.Tensor]


def takes_sizes(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> bool:
    """Is the model given pictures ``[pictures, channels, height, width]`` with their sizes, and nothing else?"""
    return ask.arguments.keys() == {PIXELS, SIZES} and example[PIXELS].ndim == len("NCHW")


def for_one_picture(ask: FeatureCall) -> FeatureCall:
    """`ask` for one picture without padding: its size is that of its pixels."""

    def function(_owner: Any, **inputs: torch.Tensor) -> Any:
        size = tuple(inputs[ask.arguments[PIXELS]].shape[-2:])
        return ask.function(**inputs, **{ask.arguments[SIZES]: [size]})

    owner = getattr(ask.function, "__self__", None)
    return FeatureCall(MethodType(function, owner), {PIXELS: ask.arguments[PIXELS]})


def single_pictures(example: Mapping[str, torch.Tensor]) -> tuple[Example, ...]:
    """The pictures of `example`, each without its padding."""
    sizes = example[SIZES].tolist()
    return tuple({PIXELS: example[PIXELS][i : i + 1, :, :h, :w].contiguous()} for i, (h, w) in enumerate(sizes))


def joining(tensors: list[torch.Tensor]) -> EachPicture | None:
    """How features of single pictures are joined: along the one axis whose size depends on them; None if none."""
    first = tensors[0].shape
    if any(len(t.shape) != len(first) for t in tensors):
        return None
    axes = {axis for t in tensors for axis, size in enumerate(t.shape) if size != first[axis]}
    return EachPicture(axes.pop()) if len(axes) == 1 else None
