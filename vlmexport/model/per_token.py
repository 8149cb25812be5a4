"""What a decoder takes for each token beside its embedding, looked up by the token's id alone."""

from __future__ import annotations

# Graph input of the decoder and output of the embedding: float ``[batch, tokens, layers, width]``, for each token what
# the layers get of it (Gemma 3n's and Gemma 4's per-layer embeddings, before they are joined with the embedding).
PER_LAYER = "per_layer_inputs"
