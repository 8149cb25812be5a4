"""Tokens that llama.cpp writes around pictures and that a vocabulary lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.gguf.byte_level import decode_symbols
from vlmexport.model.family import MetaValue
from vlmexport.runtime.llamacpp.image_tokens import PROJECTOR_TOKENS, ProjectorTokens

_NORMAL = 1


def missing_tokens(projector: str, metadata: Mapping[str, MetaValue]) -> tuple[str, ...]:
    """Tokens that mtmd looks up for `projector` and that the vocabulary (``tokenizer.*`` keys) lacks."""
    return _lacking(PROJECTOR_TOKENS.get(projector, ProjectorTokens()).looked_up, metadata)


def require_tokens(projector: str, metadata: Mapping[str, MetaValue]) -> tuple[str, ...]:
    """Notes on tokens that mtmd writes in pieces.

    Raises `UnsupportedModelError` when one is missing without which llama.cpp stops at the first picture.
    """
    if missing := missing_tokens(projector, metadata):
        raise UnsupportedModelError(
            f"the vocabulary has no token {', '.join(map(repr, missing))}, which llama.cpp puts around pictures "
            f"({projector}); it would stop at the first one. Add it to the tokenizer and resize the embeddings"
        )
    split = _lacking(PROJECTOR_TOKENS.get(projector, ProjectorTokens()).written, metadata)
    return tuple(f"llama.cpp writes {text!r} around pictures, which is no single token of this model" for text in split)


def _lacking(texts: Sequence[str], metadata: Mapping[str, MetaValue]) -> tuple[str, ...]:
    if not texts:
        return ()
    known = pieces(metadata)
    return tuple(text for text in texts if text not in known)


def pieces(metadata: Mapping[str, MetaValue]) -> set[str]:
    """What llama.cpp prints for each token: added tokens as they are, others without their byte-level or ``▁`` code."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if not isinstance(tokens, list) or not isinstance(types, list):
        raise TypeError("tokenizer.ggml.tokens and token_type are lists")
    spaced = metadata["tokenizer.ggml.model"] == "llama" or metadata["tokenizer.ggml.pre"] == "sarvam-moe"
    plain = {"<0x0A>": "\n"}
    return {
        str(text) if kind != _NORMAL else str(text).replace("▁", " ") if spaced else decode_symbols(str(text))
        for text, kind in zip(tokens, types, strict=True)
    } | {plain[str(text)] for text in tokens if text in plain}
