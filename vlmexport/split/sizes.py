"""The sizes of one picture for encoders that read their numbers: loops and views that no trace of tensors can follow.

Such an encoder is exported for one picture, whose sizes are the shape of its pixels. `Sizes` stands for the tensor that
holds them: what the encoder computes from it are numbers again, and transformers' helpers get it as a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.packed import Segments, replaced

_HELPERS = "transformers.vision_utils"


class Sizes:
    """Stands for an int64 tensor of known numbers, which may be symbols of a trace."""

    def __init__(self, values: Any) -> None:
        self._values = np.array(values, dtype=object)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"the image encoder uses the sizes of its pictures in a way that cannot be traced ({name}); such encoders "
            "are not supported yet"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self._values.shape

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return self._values.ndim

    @property
    def device(self) -> torch.device:
        """Numbers are on the host."""
        return torch.device("cpu")

    def tensor(self) -> torch.Tensor:
        """The numbers as an int64 tensor, which a trace follows."""
        flat = [torch.full((), number, dtype=torch.int64) for number in self._values.ravel()]
        return torch.stack(flat).reshape(self.shape)

    def tolist(self) -> Any:
        """The numbers in lists."""
        return self._values.tolist()

    def to(self, *_args: Any, **_kwargs: Any) -> Sizes:
        """Itself: a number has no device and no type."""
        return self

    def prod(self, dim: int) -> Any:
        """Products along an axis."""
        return _wrapped(self._values.prod(axis=dim))

    def cumsum(self, dim: int, **_kwargs: Any) -> Any:
        """Sums up to each place of an axis."""
        return _wrapped(self._values.cumsum(axis=dim))

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """The parts along an axis."""
        return tuple(_wrapped(part) for part in np.moveaxis(self._values, dim, 0))

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind())

    def __getitem__(self, key: Any) -> Any:
        return _wrapped(self._values[key])

    def __add__(self, other: Any) -> Any:
        return _wrapped(self._values + _values(other))

    def __sub__(self, other: Any) -> Any:
        return _wrapped(self._values - _values(other))

    def __mul__(self, other: Any) -> Any:
        return _wrapped(self._values * _values(other))

    def __floordiv__(self, other: Any) -> Any:
        return _wrapped(self._values // _values(other))

    def __pow__(self, other: int) -> Any:
        return _wrapped(self._values**other)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """``torch.cumsum`` and ``torch.nn.functional.pad`` of numbers; nothing else is known."""
        given = kwargs or {}
        if function is torch.cumsum:
            return args[0].cumsum(*args[1:2], **{name: value for name, value in given.items() if name == "dim"})
        if function is nn.functional.pad:
            return _padded(*args, **given)
        name = getattr(function, "__name__", str(function))
        raise UnsupportedModelError(
            f"the image encoder uses the sizes of its pictures in a way that cannot be traced ({name}); such encoders "
            "are not supported yet"
        )


def _values(other: Any) -> Any:
    return other._values if isinstance(other, Sizes) else other


def _wrapped(result: Any) -> Any:
    return Sizes(result) if isinstance(result, np.ndarray) else result


def _padded(sizes: Sizes, pad: tuple[int, int], mode: str = "constant", value: Any = 0) -> Sizes:
    widths = [(0, 0)] * (sizes.ndim - 1) + [tuple(pad)]
    return Sizes(np.pad(sizes._values, widths, constant_values=0 if value is None else int(value)))


class _Windows(Segments):
    """The lengths of windows, which each hold as many patches as the next, behind one another."""

    def __init__(self, packed: Any, count: Any, each: int) -> None:
        super().__init__(packed, torch.arange(count) // each)
        self._count, self._each = count, each

    def to(self, *_args: Any, **_kwargs: Any) -> _Windows:
        """Itself."""
        return self

    def numel(self) -> Any:
        """How many ends of windows there are, and one."""
        return self._count // self._each + 1

    def tolist(self) -> list[Any]:
        """The lengths of the pieces: one."""
        self.packed.current = self
        return [self._count]

    def hidden(self, like: torch.Tensor) -> torch.Tensor:
        """`Segments.hidden`, for the one attention whose lengths were read."""
        self.packed.current = None
        return super().hidden(like)


@contextmanager
def helped_by_sizes(encoder: nn.Module) -> Iterator[None]:
    """Within, transformers' helpers that `encoder` calls take `Sizes` of one picture."""
    helpers = sys.modules.get(_HELPERS)
    with ExitStack() as stack:
        for code in {type(module).__module__ for module in encoder.modules()}:
            for name in [n for n in vars(helpers) if n.startswith("get_vision")] if helpers else []:
                held = getattr(sys.modules[code], name, None)
                if held is not None:
                    own = _OWN.get(name, _as_tensors)
                    stack.enter_context(replaced(sys.modules[code], name, own(held)))
        yield


def _as_tensors(held: Callable[..., Any]) -> Callable[..., Any]:
    """`held`, given tensors for `Sizes`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [a.tensor() if isinstance(a, Sizes) else a for a in args]
        return held(*given, **{n: a.tensor() if isinstance(a, Sizes) else a for n, a in kwargs.items()})

    return run


def _window_index(held: Callable[..., Any]) -> Callable[..., Any]:
    """``get_vision_window_index``: where patches are not merged before, the order is that of windows.

    Windows must be full; what cuts patches into windows of its own order asks for that, too.
    """

    def run(grid: Any, *args: Any, **kwargs: Any) -> Any:
        side = kwargs["window_size"] // kwargs["patch_size"] if kwargs.get("spatial_merge_size") == 1 else 0
        if not isinstance(grid, Sizes) or not side:
            return _as_tensors(held)(grid, *args, **kwargs)
        _, rows, columns = grid.tolist()[0]
        order = torch.arange(rows * columns).reshape(rows // side, side, columns // side, side)
        packed = getattr(held, "__self__", None)
        return order.transpose(1, 2).flatten(), _Windows(packed, rows * columns, side * side)

    return run


def _nearest_position_ids(held: Callable[..., Any]) -> Callable[..., Any]:
    """``get_vision_nearest_position_ids``: the row of a square table for each patch, by how many bounds are below."""

    def run(sizes: Any, side: int, kwargs: Any = None) -> Any:
        if not isinstance(sizes, Sizes):
            return held(sizes, side, kwargs=kwargs)
        bounds = torch.arange(1 / side, 1.0, 1 / side)
        down, across = (torch.arange(n) / n for n in sizes.tolist()[0])
        rows, columns = ((places[:, None] >= bounds).long().sum(1) for places in (down, across))
        return (rows[:, None] * side + columns).flatten()

    return run


_OWN = {"get_vision_window_index": _window_index, "get_vision_nearest_position_ids": _nearest_position_ids}
