"""The decoder of a model that gives an embedding for each token: normed to length 1, zero for padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmexport.split.decoder import DecoderPart, text_decoder

if TYPE_CHECKING:
    from vlmexport.model.load import VLM


class RetrievalPart(DecoderPart):
    """Decoder and embedding layer: embeddings of inputs ``[B, S, H]`` in, embeddings ``[B, S, width]`` out."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings of length 1 for last hidden states ``[..., H]``."""
        made: torch.Tensor = self.head(hidden)
        unit: torch.Tensor = made / made.norm(dim=-1, keepdim=True)
        return unit

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, *more: Any, **named: Any) -> Any:
        """Embeddings of all positions, zero where `attention_mask` ``[B, S]`` is; see `DecoderPart.forward`."""
        return super().forward(inputs_embeds, attention_mask, *more, **named) * attention_mask.unsqueeze(-1)


def decoder_of(vlm: VLM) -> DecoderPart:
    """The decoder part of `vlm`, not yet configured."""
    kind = RetrievalPart if vlm.facts.output == "embeddings" else DecoderPart
    return kind(text_decoder(vlm.model), vlm.model.get_output_embeddings())
