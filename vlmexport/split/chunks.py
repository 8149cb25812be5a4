"""Layers whose tokens see those of their own chunk alone, found by the masks that short chunks give.

A prompt is cut into chunks of so many tokens, counted from its first one; padding is in none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.decoder import DecoderCall
from vlmexport.split.per_layer import text_arguments
from vlmexport.split.sharing import find_sources

if TYPE_CHECKING:
    from vlmexport.split.decoder import DecoderPart

# Chunks that are shorter than any prompt show which layers have them; the tokens reach into a third one.
_PROBE_CHUNK, _PROBE_TOKENS = 3, 8
Look = Callable[["DecoderPart", DecoderCall], Mapping[int, torch.Tensor | None]]


def find_chunks(family: str, part: DecoderPart, look: Look) -> tuple[int, ...]:
    """The size of the chunks that each layer of `part` sees, in tokens: 0 for a layer that sees all; empty for none.

    `look` gives the mask ``[B, 1, S, T]`` that reaches each layer in a call of the decoder (None: the causal one).
    Raises `UnsupportedModelError` naming the first layer whose mask is neither causal nor made of chunks.
    """
    decoder: Any = part.decoder
    text = decoder.config.get_text_config()
    size = getattr(text, "attention_chunk_size", None)
    if not size:
        return ()
    embeds = torch.zeros(1, _PROBE_TOKENS, text.hidden_size, dtype=decoder.dtype)
    given = {"inputs_embeds": embeds, "use_cache": False, **text_arguments(decoder, 1, _PROBE_TOKENS)}
    text.attention_chunk_size = _PROBE_CHUNK
    try:
        masks = look(part, DecoderCall(given, torch.empty(0)))
    finally:
        text.attention_chunk_size = size
    ones = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64)
    causal, cut = (seen_in_chunk(ones, _PROBE_TOKENS, chunk) for chunk in (0, _PROBE_CHUNK))
    found: dict[int, int] = {}
    for layer, mask in masks.items():
        shown = causal if mask is None else mask if mask.dtype == torch.bool else mask == 0
        if not any(torch.equal(shown, known) for known in (causal, cut)):
            raise UnsupportedModelError(
                f"{family}: layer {layer} of its decoder sees neither all earlier tokens nor those of a chunk of "
                f"{size}; such layers are not supported yet"
            )
        found[layer] = 0 if torch.equal(shown, causal) else int(size)
    if any(found.values()) and find_sources(decoder):
        raise UnsupportedModelError(
            f"{family}: layers of its decoder see chunks of {size} tokens, and some read the keys of another layer; "
            "the two together are not supported yet"
        )
    layers = range(max(found, default=-1) + 1)
    return tuple(found.get(layer, 0) for layer in layers) if any(found.values()) else ()


def seen_in_chunk(valid: torch.Tensor, length: int, chunk: int) -> torch.Tensor:
    """Bool ``[B, 1, S, T]``: does new token i of `length` see token j, of its own chunk and not behind it?

    `valid`: ``[B, T]``, 1 for each token so far that is not padding. `chunk` 0: chunks without end.
    """
    places = valid.long().cumsum(dim=1) - 1
    queries, keys = places[:, valid.shape[1] - length :, None], places[:, None, :]
    seen = (keys <= queries) & valid.bool()[:, None, :]
    if chunk:
        seen = seen & (queries // chunk == keys // chunk)
    return seen[:, None]


def refuse_chunks(family: str, part: DecoderPart, attention: str) -> None:
    """Refuse a form of attention other than ``standard`` for a decoder with chunks, or with layers that count tokens.

    Raises `UnsupportedModelError` naming the family and the form.
    """
    if attention == "standard" or not (part.chunks or part.counted):
        return
    what = f"see chunks of {max(part.chunks)} tokens" if part.chunks else "compute with the number of tokens so far"
    out = "use --attention standard" if attention == "gqa" else "`vlmexport onnx --attention standard` writes it"
    raise UnsupportedModelError(
        f"{family}: layers of its decoder {what}, which the {attention} form of attention has no operator for; {out}"
    )
