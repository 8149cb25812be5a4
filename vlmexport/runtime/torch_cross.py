"""What the decoder of the reference attends to beside its tokens, by the model's own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import BadInputError
from vlmexport.model.cross import STATE_MASK
from vlmexport.model.merge import MergeSpec
from vlmexport.split.cross import STATES
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.encoder_decoder import TextEncoder, is_encoder_decoder, start_token
from vlmexport.split.parts import Role

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split


def plain_merge(vlm: VLM) -> MergeSpec:
    """How inputs are merged for a model that was not split: features in the places of image tokens."""
    start = start_token(vlm.model) if is_encoder_decoder(vlm.model) else None
    return MergeSpec(vlm.facts.image_token_id, decoder_start_token_id=start)


@torch.no_grad()
def encoded(model: Any, split: Split | None, embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """The decoder's arguments for merged embeddings ``[B, S, H]`` and their mask ``[B, S]``."""
    module = None if split is None else split.parts[Role.ENCODER].module
    if isinstance(module, TextEncoder):
        states = module.states(embeds, mask)
    else:
        states = model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    return {STATES[0]: states, STATE_MASK: mask}


def tile_arguments(
    part: DecoderPart, mask: torch.Tensor, states: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The decoder's arguments for new tokens with the tiles of `mask` ``[B, S, tiles]``.

    `states` ``[B, T, width]`` come with the prompt; later the cache has their keys and values.
    """
    if part.cross is None:
        raise BadInputError("the decoder attends to no tiles")
    given = part.cross.arguments(torch.zeros(0, dtype=dtype) if states is None else states, mask)
    return {**given, part.cross.states: states}
