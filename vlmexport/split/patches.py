"""Towers that take each picture's patches in a row padded to the longest, with their number down and across.

Such a tower is exported for one picture, whose patches then lie in a grid: its size is the shape of the grid, and
nothing is padded. The table of positions is resized by two matrix products that are made from that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.pictures import GRIDS, PATCH_MASK, PIXELS
from vlmexport.split.features import FeatureCall

Example = dict[str, torch.Tensor]


def takes_patches(ask: FeatureCall, example: Mapping[str, torch.Tensor]) -> bool:
    """Is the model given patches ``[pictures, patches, values]`` with their grids and a mask, and nothing else?

    The mask must show the first ``rows * columns`` patches of each picture.
    """
    if ask.arguments.keys() != {PIXELS, GRIDS, PATCH_MASK} or example[PIXELS].ndim != len("NPV"):
        return False
    counts = example[GRIDS].prod(dim=1)
    return bool(torch.equal(example[PATCH_MASK].bool(), torch.arange(example[PIXELS].shape[1]) < counts[:, None]))


def one_grid(ask: FeatureCall) -> FeatureCall:
    """`ask` for one picture ``[1, values, rows, columns]`` of patches."""
    owner: Any = getattr(ask.function, "__self__", None)

    def function(_owner: Any, **inputs: torch.Tensor) -> Any:
        pixels = inputs[ask.arguments[PIXELS]]
        rows, columns = pixels.shape[-2:]
        given = {
            ask.arguments[PIXELS]: pixels.flatten(2).transpose(1, 2),
            ask.arguments[GRIDS]: _Grid(rows, columns),
            ask.arguments[PATCH_MASK]: _Everything(rows * columns),
        }
        with _no_mask(owner), resized_by_matrices():
            return ask.function(**given)

    return FeatureCall(MethodType(function, owner), {PIXELS: ask.arguments[PIXELS]})


def grids(example: Mapping[str, torch.Tensor]) -> tuple[Example, ...]:
    """The pictures of `example`, each as its grid of patches ``[1, values, rows, columns]``."""
    sizes = example[GRIDS].tolist()
    cut = [example[PIXELS][i, : h * w].T.reshape(1, -1, h, w) for i, (h, w) in enumerate(sizes)]
    return tuple({PIXELS: picture.contiguous()} for picture in cut)


class _OfOnePicture:
    """Stands for an input of the model that is no tensor in a trace; what is not known to be right is refused."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"the image encoder uses the grids or the mask of its pictures in a way that cannot be traced ({name}); "
            "such encoders are not supported yet"
        )


class _Size(tuple[Any, ...]):
    """Rows and columns."""

    def tolist(self) -> list[Any]:
        """As the tensor that it stands for."""
        return list(self)


class _Grid(_OfOnePicture):
    """``spatial_shapes`` ``[1, 2]`` of one picture."""

    def __init__(self, rows: Any, columns: Any) -> None:
        self.shape = (1, 2)
        self._size = _Size((rows, columns))

    def __getitem__(self, picture: int) -> _Size:
        return (self._size,)[picture]


class _Everything(_OfOnePicture):
    """The mask ``[1, patches]`` of a picture without padding."""

    def __init__(self, patches: Any) -> None:
        self._patches = patches

    def sum(self, dim: int) -> tuple[Any, ...]:
        """How many patches each picture has."""
        return (self._patches,) if dim in (1, -1) else self.__getattr__("sum")


@contextmanager
def _no_mask(owner: Any) -> Iterator[None]:
    """Within, the image encoder of `owner` is told of no mask where it would be given `_Everything`."""

    def leave_out(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: None if isinstance(given, _Everything) else given for name, given in kwargs.items()}

    handle = owner.get_encoder("image").register_forward_pre_hook(leave_out, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def resized_by_matrices() -> Iterator[None]:
    """Within, ``interpolate`` with antialiasing multiplies by `antialiasing` matrices: any size can be traced."""
    before = nn.functional.interpolate

    def resize(input: torch.Tensor, size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        settings = kwargs.get("mode"), kwargs.get("antialias"), bool(kwargs.get("align_corners"))
        if args or size is None or settings != ("bilinear", True, False):
            return before(input, size, *args, **kwargs)
        down, across = (antialiasing(n, m) for n, m in zip(input.shape[-2:], size, strict=True))
        return down.to(input.dtype) @ input @ across.T.to(input.dtype)

    nn.functional.interpolate = resize
    try:
        yield
    finally:
        nn.functional.interpolate = before


def antialiasing(source: int, target: Any) -> torch.Tensor:
    """Float32 ``[target, source]``: what each of `target` places takes of `source` ones, as PyTorch resizes bilinearly.

    A place takes a triangle around its centre, one source place wide on either side, or as wide as it is itself when
    places become fewer; weights add up to 1.
    """
    step = source / torch.full((), target, dtype=torch.float32)
    width = step.clamp_min(1.0)
    centres = (torch.arange(target, dtype=torch.float32) + 0.5) * step
    distances = torch.arange(source, dtype=torch.float32) + 0.5 - centres[:, None]
    weights = (1.0 - (distances / width).abs()).clamp_min(0.0)
    return weights / weights.sum(dim=1, keepdim=True)
