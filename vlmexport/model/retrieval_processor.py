"""Processors of models that give embeddings: they take a page or a query, never both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image


def check_processor(processor: Any, name: str) -> None:
    """Raise `BadInputError` unless `processor` (of `name`) makes inputs of pages and of queries."""
    if not all(callable(getattr(processor, call, None)) for call in ("process_images", "process_queries")):
        raise BadInputError(f"{name}: {type(processor).__name__} makes no inputs of pages and queries")


def processed(processor: Any, item: Image | str) -> Mapping[str, Any]:
    """The processor's PyTorch tensors of one page (a picture) or one query (a text), batch 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if isinstance(item, str):
            made: Mapping[str, Any] = processor.process_queries(text=[item], return_tensors="pt")
        else:
            made = processor.process_images(images=[item], return_tensors="pt")
    return made
