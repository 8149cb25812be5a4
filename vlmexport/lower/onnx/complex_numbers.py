"""Complex numbers of a decoder as pairs of real ones: ONNX has no operators for them.

Within `real_pairs`, ``torch.polar`` and ``torch.view_as_complex`` give `Pairs`, which know what rotary embeddings do:
products, places, and being seen as real numbers again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlmexport.errors import UnsupportedModelError


class Pairs:
    """Complex numbers ``[...]`` as real tensors ``[..., 2]`` of their real and imaginary parts."""

    def __init__(self, pair: torch.Tensor) -> None:
        self.pair = pair

    @property
    def shape(self) -> torch.Size:
        """Of the complex numbers."""
        return self.pair.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.pair.device

    def to(self, *_args: Any, **_kwargs: Any) -> Pairs:
        """Themselves: a trace has one device and one type."""
        return self

    def __getitem__(self, index: Any) -> Pairs:
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            parts = (*parts, slice(None))
        return Pairs(self.pair[parts])

    def __mul__(self, other: Any) -> Pairs:
        if isinstance(other, torch.Tensor) and other.is_complex():
            raise UnsupportedModelError(
                "the decoder multiplies by complex numbers that it keeps, which has no ONNX form"
            )
        if not isinstance(other, Pairs):
            return Pairs(self.pair * (other[..., None] if isinstance(other, torch.Tensor) else other))
        (a, b), (c, d) = self.pair.unbind(-1), other.pair.unbind(-1)
        return Pairs(torch.stack((a * c - b * d, a * d + b * c), dim=-1))

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModelError(f"the decoder computes {name} of complex numbers, which has no ONNX form here")


@contextmanager
def real_pairs() -> Iterator[None]:
    """Within, functions of torch that make complex numbers make `Pairs`, and ``torch.view_as_real`` takes them."""
    made: dict[str, Callable[..., Any]] = {"polar": _polar, "view_as_complex": Pairs, "view_as_real": _real}
    before = {name: getattr(torch, name) for name in made}
    for name, function in made.items():
        setattr(torch, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _polar(size: torch.Tensor, angle: torch.Tensor) -> Pairs:
    return Pairs(torch.stack((size * angle.cos(), size * angle.sin()), dim=-1))


def _real(numbers: Any) -> torch.Tensor:
    """The real numbers of `Pairs`; torch's own function for complex numbers that were there before."""
    if isinstance(numbers, Pairs):
        return numbers.pair
    real: torch.Tensor = torch.ops.aten.view_as_real(numbers)
    return real
