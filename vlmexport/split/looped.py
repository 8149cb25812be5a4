"""Encoders that take the patches of all pictures in one row, and loop over the numbers of the pictures' grids.

The loop cannot be traced for any number of pictures, so such an encoder is exported for one: its patches are given as a
grid ``[1, values, rows, columns]``, in whatever order the processor has them, whose shape says the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from vlmexport.model.pictures import FRAMED, PIXELS
from vlmexport.split.features import FeatureCall

Example = dict[str, torch.Tensor]


def loops_over_grids(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> bool:
    """Is the model given patches ``[patches, values]`` with grids of one frame, which its encoder asks for numbers?

    Seen by running it once.
    """
    owner: Any = getattr(ask.function, "__self__", None)
    if ask.arguments.keys() != {PIXELS, FRAMED} or example[PIXELS].ndim != len("PV") or owner is None:
        return False
    encoder = owner.get_encoder("image")
    if encoder in (owner, owner.base_model) or not bool((example[FRAMED][:, 0] == 1).all()):
        return False
    inside: list[nn.Module] = []
    asked: list[bool] = []

    class Watched(torch.Tensor):
        def tolist(self) -> Any:
            asked.append(bool(inside) and self.ndim == len("NT"))
            return super().tolist()

    handles = [
        encoder.register_forward_pre_hook(lambda module, _args: inside.append(module)),
        encoder.register_forward_hook(lambda *_call: inside.clear()),
    ]
    try:
        with torch.no_grad():
            ask({**example, FRAMED: example[FRAMED].as_subclass(Watched)})
    finally:
        for handle in handles:
            handle.remove()
    return any(asked)


def one_looped(ask: FeatureCall) -> FeatureCall:
    """`ask` for one picture ``[1, values, rows, columns]`` of patches."""

    def function(_owner: Any, **inputs: torch.Tensor) -> Any:
        pixels = inputs[ask.arguments[PIXELS]]
        rows, columns = pixels.shape[-2:]
        grid: Any = torch.stack([torch.full((), size, dtype=torch.int64) for size in (1, rows, columns)])[None]
        grid.tolist = lambda: [[1, rows, columns]]  # a traced tensor has no numbers; these are the shape's
        patches = pixels.flatten(2)[0].transpose(0, 1)
        return ask.function(**{ask.arguments[PIXELS]: patches, ask.arguments[FRAMED]: grid})

    return FeatureCall(MethodType(function, getattr(ask.function, "__self__", None)), {PIXELS: ask.arguments[PIXELS]})


def looped_pictures(example: Mapping[str, torch.Tensor]) -> tuple[Example, ...]:
    """The pictures of `example`, each as a grid of its patches ``[1, values, rows, columns]``."""
    sizes = [(rows, columns) for _, rows, columns in example[FRAMED].tolist()]
    cut = torch.split(example[PIXELS], [rows * columns for rows, columns in sizes])
    made = [patches.T.reshape(1, -1, *size) for patches, size in zip(cut, sizes, strict=True)]
    return tuple({PIXELS: picture.contiguous()} for picture in made)
