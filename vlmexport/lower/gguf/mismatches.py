"""Where llama.cpp's multimodal code silently does something else than the model's own processor.

Facts are read off tools/mtmd/mtmd.cpp of b11549 (``mtmd_context::init_vision``, ``lookup_token``, ``add_media``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.gguf.byte_level import decode_symbols
from vlmexport.model.family import MetaValue

_NORMAL = 1


@dataclass(frozen=True)
class ProjectorTokens:
    """Tokens that mtmd puts around pictures for one ``clip.projector_type``.

    `looked_up` are found by their text among single tokens; an absent one goes into the prompt as id -1, which
    ``llama_decode`` refuses. `written` go through the tokenizer; one that is no single token becomes several.
    """

    looked_up: tuple[str, ...] = ()
    written: tuple[str, ...] = ()


_VISION = ("<|vision_start|>", "<|vision_end|>")
PROJECTOR_TOKENS: dict[str, ProjectorTokens] = {
    "idefics3": ProjectorTokens(
        looked_up=("\n\n", "\n", "<fake_token_around_image>", "<global-img>"),
        written=("<row_1_col_1>",),
    ),
    "lfm2": ProjectorTokens(
        looked_up=("<|img_thumbnail|>",), written=("<|image_start|>", "<|image_end|>", "<|img_row_1_col_1|>")
    ),
    "qwen2vl_merger": ProjectorTokens(written=_VISION),
    "qwen2.5vl_merger": ProjectorTokens(written=_VISION),
    "qwen3vl_merger": ProjectorTokens(written=_VISION),
    "gemma3": ProjectorTokens(written=("<start_of_image>", "<end_of_image>")),
    "pixtral": ProjectorTokens(written=("[IMG_END]",)),
    "internvl": ProjectorTokens(written=("<img>", "</img>")),
    "llama4": ProjectorTokens(written=("<|image_start|>", "<|image_end|>")),
}


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


def image_splitting_note(preprocessor: Mapping[str, Any], model_type: str) -> str:
    """A note when the model does not cut pictures into tiles but llama.cpp does; "" otherwise.

    `preprocessor` is a parsed preprocessor_config.json, or the ``image_processor`` of a processor_config.json.
    """
    settings = preprocessor.get("image_processor", preprocessor)
    if model_type not in _ALWAYS_SPLIT or settings.get("do_image_splitting", True):
        return ""
    return (
        f"{model_type}: do_image_splitting is false, but llama.cpp reads no such key and cuts every picture into tiles "
        "and a whole view: it makes another prompt than the model was trained with"
    )


# Model types whose projector (idefics3) mtmd always gives tiles.
_ALWAYS_SPLIT = ("idefics3", "smolvlm")


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
