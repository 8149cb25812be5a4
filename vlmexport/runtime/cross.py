"""A decoder graph with cross-attention, and the graph that makes the keys and values for it once for each prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.model.cross import STATE_MASK, STATES, TILE_MASK
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.decoder import DecoderSession
from vlmexport.runtime.protocol import Array, Cache, Extras
from vlmexport.runtime.sessions import PartSession
from vlmexport.runtime.tiles import check_states, last_rows, missing_tiles

Ids = NDArray[np.int64]


class CrossDecoder:
    """Called as `DecoderSession` is: what the decoder attends to beside its tokens stays in the cache.

    `embed` gives the embeddings of ids; an encoder-decoder starts its answer with one.
    """

    def __init__(
        self, decoder: DecoderSession, encoder: PartSession, spec: MergeSpec, embed: Callable[[Ids], Array]
    ) -> None:
        self.decoder, self.encoder, self.spec, self.embed = decoder, encoder, spec, embed

    def prefill(
        self, sequence: Array, attention_mask: Ids, keep: int, reserve: int, extras: Extras | None = None
    ) -> tuple[Array, Cache]:
        """Start a batch; see `Runner.prefill`. An encoder-decoder gives the logits of each answer's first token.

        Raises `BadInputError` for features without their mask, a mask of tiles without features, and prompts of an
        encoder-decoder that are padded on the left.
        """
        if self.spec.decoder_start_token_id is None:
            return self._prefill_tokens(sequence, attention_mask, keep, reserve, dict(extras or {}))
        if extras:
            raise BadInputError(f"the decoder takes no {next(iter(extras))}")
        if not attention_mask[:, 0].all():
            raise BadInputError("the text encoder counts positions from the first token: pad prompts on the right")
        keys = self._keys({"inputs_embeds": sequence, "attention_mask": attention_mask})
        fixed = {**keys, STATE_MASK: np.asarray(attention_mask, np.int64)}
        start = np.full((len(sequence), 1), self.spec.decoder_start_token_id, np.int64)
        return self.decoder.prefill(self.embed(start), np.ones_like(start), 1, reserve, None, fixed)

    def decode(self, sequence: Array, cache: Cache, keep: int, extras: Extras | None = None) -> Array:
        """Continue every row; see `Runner.decode`. A token sees what the last one of its prompt saw."""
        return self.decoder.decode(sequence, cache, keep, extras)

    def _prefill_tokens(
        self, sequence: Array, attention_mask: Ids, keep: int, reserve: int, extras: dict[str, Array]
    ) -> tuple[Array, Cache]:
        check_states(extras)
        batch, tokens = attention_mask.shape
        states = extras.pop(STATES, None)
        if states is None:
            states = np.zeros((batch, self.spec.tile_tokens, self.encoder_width), np.float32)
        mask = extras.setdefault(TILE_MASK, missing_tiles(batch, tokens, states.shape[1] // self.spec.tile_tokens))
        keys = self._keys({STATES: states})
        logits, cache = self.decoder.prefill(sequence, attention_mask, keep, reserve, extras, keys)
        cache.repeated[TILE_MASK] = last_rows(mask, attention_mask)
        return logits, cache

    @property
    def encoder_width(self) -> int:
        """Values of one state."""
        width = self.encoder.session.get_inputs()[0].shape[-1]
        return int(width)

    def _keys(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Keys and values by the decoder's inputs, in its types."""
        made = zip(self.encoder.outputs, self.encoder.run(inputs), strict=True)
        return {name: np.asarray(array, self.decoder.input_types[name]) for name, array in made}
