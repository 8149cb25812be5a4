"""The split of a model whose decoder has layers that attend to image features, and never sees them as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.manifest import TensorSpec
from vlmexport.model.cross import STATES, TILE_MASK, reached_tiles, tile_mask
from vlmexport.model.merge import MergeSpec
from vlmexport.split.cross import CrossDecoder, CrossKeys, find_cross
from vlmexport.split.decoder import DecoderCall, text_decoder
from vlmexport.split.difference import refuse_difference
from vlmexport.split.encoder_decoder import decoder_part, key_value_specs
from vlmexport.split.language import LanguageParts
from vlmexport.split.parts import Part, Role, Signature
from vlmexport.split.usage import parameters_behind
from vlmexport.split.vision import VisionPart

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

Example = dict[str, torch.Tensor]
_ROWS = "full_text_row_masked_out_mask"


class StateKeys(VisionPart):
    """Image features ``[B, T, width]`` in, keys and values of every cross-attention out.

    It has the parameters of the whole model under their names; `used` are those that it computes with.
    """

    # No attention runs in it.
    attending = None

    def __init__(self, model: Any, keys: CrossKeys, states: torch.Tensor) -> None:
        super().__init__(model, tuple(keys.cross.names), ())
        self._cut = (keys,)
        self.used = parameters_behind(model, lambda: self(**{STATES: states}))

    def forward(self, cross_attention_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values ``[B, heads, T, head_dim]`` in the order of `outputs`."""
        return tuple(self._cut[0](cross_attention_states).values())


def crosses(calls: Sequence[DecoderCall]) -> bool:
    """Is the decoder of `calls` given image features to attend to?"""
    return any(isinstance(call.kwargs.get(STATES), torch.Tensor) for call in calls)


def split_cross_attention(vlm: VLM, examples: tuple[Example, ...], calls: Sequence[DecoderCall]) -> LanguageParts:
    """The decoder and what makes its keys and values, proven on every example.

    Raises `UnsupportedModelError` when they do not reproduce the model's logits, or its masks are others.
    """
    model, decoder = vlm.model, text_decoder(vlm.model)
    states = [_states(call) for call in calls]
    tile_tokens = calls[0].kwargs[STATES].shape[-2]
    cross, kv = find_cross(vlm.facts.model_type, decoder, STATES, states[0].shape[-1], tile_tokens)
    whole = CrossDecoder(decoder, model.get_output_embeddings(), cross)
    whole.kv = kv
    inner = StateKeys(model, CrossKeys(decoder, cross), states[0])
    difference, given, seen = 0.0, [], []
    for example, call, rows in zip(examples, calls, states, strict=True):
        mask = _mask(vlm, example, call, tile_tokens)
        with torch.no_grad():
            keys = dict(zip(inner.outputs, inner(rows), strict=True))
            embeds = model.get_input_embeddings()(example["input_ids"])
            ones = torch.ones_like(example["input_ids"])
            given.append({"inputs_embeds": embeds, "attention_mask": ones, **keys, TILE_MASK: mask})
            logits = whole(**given[-1])
        difference = max(difference, refuse_difference(vlm, "decoder and LM head", logits, call.logits))
        seen.append(DecoderCall({"inputs_embeds": embeds, STATES: rows}, call.logits))
    merge = MergeSpec(
        vlm.facts.image_token_id,
        place="cross_attention",
        extras=(TILE_MASK,),
        cross_layers=tuple(cross.kept),
        tile_tokens=tile_tokens,
    )
    signature = Signature(
        (TensorSpec(STATES, "float32", ("batch_size", "cross_length", cross.width)),),
        key_value_specs(cross, "cross_length"),
    )
    # A trace takes an axis of 1 for a constant: the features of one prompt twice.
    prompts = tuple({STATES: rows} for rows in (states[0].repeat(2, 1, 1), *states))
    parts = {
        Role.ENCODER: Part(Role.ENCODER, inner, "", signature, prompts),
        Role.DECODER: decoder_part(whole, tuple(given), vlm, (TILE_MASK,)),
    }
    return LanguageParts(parts, merge, kv, seen, difference)


def _states(call: DecoderCall) -> torch.Tensor:
    """Image features of one prompt ``[1, T, width]``."""
    states: torch.Tensor = call.kwargs[STATES]
    return states.reshape(1, -1, states.shape[-1])


def _mask(vlm: VLM, example: Example, call: DecoderCall, tile_tokens: int) -> torch.Tensor:
    """The prompt's mask of tiles, int64 ``[1, S, tiles]``: what it says must be what the layers were given."""
    family = vlm.facts.model_type
    if TILE_MASK not in example or call.kwargs.get(TILE_MASK) is None or call.kwargs.get(_ROWS) is None:
        raise UnsupportedModelError(f"{family}: its decoder attends to image features without a {TILE_MASK}")
    mask = torch.from_numpy(tile_mask(example[TILE_MASK].numpy()))
    seen, rows = reached_tiles(mask, tile_tokens)
    given, given_rows = call.kwargs[TILE_MASK], call.kwargs[_ROWS]
    if not torch.equal(given == 0, seen) or not torch.equal(given_rows != 0, rows):
        raise UnsupportedModelError(f"{family}: its {TILE_MASK} means something else than which tiles a token sees")
    return mask


def check_states(vlm: VLM, features: torch.Tensor, call: DecoderCall) -> float:
    """By how much the projector's rows differ from what the decoder was given; refuses more than rounding."""
    states = call.kwargs[STATES]
    return refuse_difference(vlm, "image features", features.to(states.dtype), states[0])
