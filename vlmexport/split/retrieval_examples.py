"""Example inputs of a model that gives embeddings of pages and queries: its processor takes one or the other."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.retrieval_processor import check_processor, processed

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmexport.model.load import VLM

_PROCESSOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, BadInputError)


def retrieval_inputs(vlm: VLM, processor: Any, item: Image | str) -> dict[str, torch.Tensor]:
    """What the model's ``forward`` takes for one page or query, from its processor, batch 1.

    Raises `UnsupportedModelError` when the processor cannot make it.
    """
    try:
        check_processor(processor, vlm.source)
        made = processed(processor, item)
    except _PROCESSOR_ERRORS as error:
        told = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: {type(processor).__name__} cannot make inputs of a page or query: {told}"
        ) from error
    # The wrapper hands the rest on to the model inside.
    inner: Any = vlm.model.base_model
    taken = {*inspect.signature(vlm.model.forward).parameters, *inspect.signature(inner.forward).parameters}
    return {k: v for k, v in made.items() if k in taken - {"labels"} and isinstance(v, torch.Tensor)}


def with_words(page: dict[str, torch.Tensor], query: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`page` with the tokens of `query` behind its own: a prompt of another length."""
    text = page.keys() & query.keys()
    return {name: torch.cat([t, query[name]], dim=1) if name in text else t for name, t in page.items()}
