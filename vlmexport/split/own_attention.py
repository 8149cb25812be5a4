"""Code that is not transformers': layers that compute attention by themselves, and what such code raises."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.remote import is_remote, running_remote_code

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.decoder import DecoderPart


def require_interface(vlm: VLM, part: DecoderPart, called: Collection[int]) -> None:
    """Refuse a decoder with layers that keep keys and values and whose attention is no call of AttentionInterface.

    `called` are the layers that called it. A trace would hold such a layer's attention without its past, so its graph
    would be wrong from the second token on.
    """
    kv = part.kv or vlm.facts.kv
    if own := [layer for layer in kv.keeping if layer not in called]:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: layer {own[0]} of the decoder {type(part.decoder).__name__} computes attention "
            f"in its own code ({len(own)} of {kv.layers} layers do); vlmexport needs transformers' AttentionInterface "
            "to give it a cache"
        )


@contextmanager
def remote_errors(vlm: VLM) -> Iterator[None]:
    """What a model of remote code raises when it is run and traced, as one line; errors of other models are left."""
    if not is_remote(vlm.model):
        yield
        return
    with running_remote_code(vlm.path):
        yield
