"""Layers of a trace whose attention computes with the number of tokens before each one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmexport.split.counted import CountedRows, counted_modules
from vlmexport.split.decoder import DecoderPart


@contextmanager
def counted_in_trace(part: DecoderPart) -> Iterator[None]:
    """Within, the layers `part.counted` take their tokens' places from the decoder's positions.

    What stands in for attention by then gets the rows of a batch apart, as it does in every other layer.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not part.counted:
        yield
        return
    decoder: Any = part.decoder
    rows, name = CountedRows(counted_modules(decoder, part.counted)), decoder.config._attn_implementation
    AttentionInterface.register(name, rows.attending(ALL_ATTENTION_FUNCTIONS[name]))

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        rows.positions = kwargs["position_ids"]

    handle = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with rows.counted():
            yield
    finally:
        handle.remove()
