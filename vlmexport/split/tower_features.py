"""Image features of models that run the image encoder of the model inside themselves, and not by its function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from vlmexport.model.pictures import FRAMED, PIXELS

_FUNCTION = "get_image_features"


class SeenEncoderError(Exception):
    """Carries the image encoder's first argument out of the model."""

    def __init__(self, pixels: Any) -> None:
        super().__init__("image encoder")
        self.pixels = pixels


@contextmanager
def stopped_at_encoder(model: Any) -> Iterator[None]:
    """Within, running the image encoder raises `SeenEncoderError`, where only the model inside `model` has one."""
    inner = getattr(model, "base_model", model)
    inside = inner is not model and not hasattr(model, _FUNCTION) and hasattr(inner, "get_encoder")
    encoder = inner.get_encoder("image") if inside else None
    if encoder is None or encoder is inner:
        yield
        return
    handle = encoder.register_forward_pre_hook(_seen, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def patches_function(
    model: Any, inputs: Mapping[str, torch.Tensor], seen: SeenEncoderError
) -> tuple[Callable[..., Any], dict[str, str]] | None:
    """The inner model's ``get_image_features`` for one page's patches ``[1, patches, values]``, and its arguments.

    Such a model takes the patches of each page in a row that is padded to the longest, with the grids of the pages, and
    gives its encoder those that are no padding. Of one page they are the row itself: None unless the encoder was `seen`
    to get that.
    """
    pixels = inputs.get(PIXELS)
    if pixels is None or FRAMED not in inputs or pixels.ndim != len("NPV") or len(pixels) != 1:
        return None
    if not isinstance(seen.pixels, torch.Tensor) or not torch.equal(seen.pixels, pixels[0]):
        return None

    def function(inner: Any, **given: torch.Tensor) -> Any:
        return getattr(inner, _FUNCTION)(given[PIXELS].flatten(0, 1), given[FRAMED])

    return MethodType(function, model.base_model), {PIXELS: PIXELS, FRAMED: FRAMED}


def _seen(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise SeenEncoderError(args[0] if args else next(iter(kwargs.values()), None))
