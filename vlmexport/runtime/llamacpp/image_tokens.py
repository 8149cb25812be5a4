"""The tokens that llama.cpp itself writes around pictures.

Facts are read off tools/mtmd/mtmd.cpp of b11549 (``mtmd_context::init_vision``, ``lookup_token``, ``add_media``).
"""

from __future__ import annotations

from dataclasses import dataclass


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
    "mlp": ProjectorTokens(),
    "mlp_norm": ProjectorTokens(),
}
