"""Encoders that take the patches of all pictures in one row, and read the numbers of the pictures' sizes.

They loop over the pictures, which cannot be traced for any number of them. So such an encoder is exported for one: its
patches are given as a grid ``[1, values, rows, columns]``, in whatever order the processor has them, whose shape says
the numbers (`sizes.Sizes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmexport.model.pictures import FRAMED, PIXELS, STRIPPED, EachPicture
from vlmexport.split.features import FeatureCall
from vlmexport.split.sizes import Sizes, helped_by_sizes

Example = dict[str, torch.Tensor]


def reads_sizes(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> bool:
    """Is the model given patches of all pictures with their sizes, of which its vision side reads the numbers?

    Patches are ``[patches, …]`` with grids of one frame, or ``[1, channels, side, side * patches]`` with rows and
    columns. What else it is given must be the same number for every picture. Seen by running it once.
    """
    owner: Any = getattr(ask.function, "__self__", None)
    named = _sizes_name(ask.arguments)
    if named is None or owner is None or not _one_frame(named, example):
        return False
    others = ask.arguments.keys() - {PIXELS, named}
    encoder = owner.get_encoder("image")
    if encoder in (owner, owner.base_model) or others != {name for name, _ in fixed_numbers(_only(ask, example))}:
        return False
    inside: list[nn.Module] = []
    asked: list[bool] = []

    class Watched(torch.Tensor):
        def tolist(self) -> Any:
            asked.append(bool(inside) and self.ndim == len("NT"))
            return super().tolist()

        def __iter__(self) -> Iterator[Any]:
            asked.append(bool(inside))
            return iter(self.unbind())

    handles = [
        handle
        for child in owner.children()
        for handle in (
            child.register_forward_pre_hook(lambda module, _args: inside.append(module)),
            child.register_forward_hook(lambda *_call: inside.clear()),
        )
    ]
    try:
        with torch.no_grad():
            ask({**example, named: example[named].as_subclass(Watched)})
    finally:
        for handle in handles:
            handle.remove()
    return any(asked)


def _sizes_name(names: Mapping[str, Any]) -> str | None:
    """Which input says the sizes; None where none does, or no pixels are given with it."""
    found = [name for name in (FRAMED, STRIPPED) if name in names]
    return found[0] if len(found) == 1 and PIXELS in names else None


def _one_frame(named: str, example: Mapping[str, torch.Tensor]) -> bool:
    pixels = example[PIXELS]
    if named == FRAMED:
        return pixels.ndim >= len("PV") and bool((example[FRAMED][:, 0] == 1).all())
    return pixels.ndim == len("NCHW") and len(pixels) == 1


def _only(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> Example:
    return {name: tensor for name, tensor in example.items() if name in ask.arguments}


def fixed_numbers(example: Mapping[str, torch.Tensor]) -> tuple[tuple[str, int], ...]:
    """Inputs beside patches and their sizes that hold one number for each picture, and always the same."""
    named = _sizes_name(example)
    if named is None:
        return ()
    found = []
    for name, tensor in example.items():
        whole = name not in (PIXELS, named) and not tensor.is_floating_point()
        if whole and tensor.shape == (len(example[named]),) and bool((tensor == tensor[0]).all()):
            found.append((name, int(tensor[0])))
    return tuple(found)


def one_looped(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> FeatureCall:
    """`ask` for one picture ``[1, values, rows, columns]`` of patches; `example` are inputs of `ask`."""
    owner: Any = getattr(ask.function, "__self__", None)
    named = FRAMED if FRAMED in ask.arguments else STRIPPED
    fixed = {ask.arguments[name]: Sizes([number]) for name, number in fixed_numbers(_only(ask, example))}
    shape = example[PIXELS].shape

    def function(_owner: Any, **inputs: torch.Tensor) -> Any:
        pixels = inputs[ask.arguments[PIXELS]]
        rows, columns = pixels.shape[-2:]
        patches = pixels.flatten(2)[0].transpose(0, 1)
        if named == FRAMED:
            given, sizes = patches.reshape(-1, *shape[1:]), Sizes([[1, rows, columns]])
        else:
            each = patches.reshape(-1, shape[1], shape[2], shape[2])
            given, sizes = each.permute(1, 2, 0, 3).flatten(2)[None], Sizes([[rows, columns]])
        with helped_by_sizes(owner.get_encoder("image")):
            return ask.function(**{ask.arguments[PIXELS]: given, ask.arguments[named]: sizes, **fixed})

    return FeatureCall(MethodType(function, owner), {PIXELS: ask.arguments[PIXELS]})


def looped_pictures(example: Mapping[str, torch.Tensor]) -> tuple[Example, ...]:
    """The pictures of `example`, each as a grid of its patches ``[1, values, rows, columns]``."""
    arrays = {name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
              for name, tensor in example.items()}  # fmt: skip
    dtype = example[PIXELS].dtype
    cut = EachPicture(0, patches=True).pictures(arrays)
    return tuple({PIXELS: torch.from_numpy(np.ascontiguousarray(one[PIXELS])).to(dtype)} for one in cut)
