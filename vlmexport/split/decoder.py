"""The decoder as a part: the language model with its LM head, and a look at what reaches it and its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.kv import KVGeometry
from vlmexport.model.per_token import PER_LAYER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmexport.split.cross import CrossAttention
    from vlmexport.split.logits import HiddenTokens, LogitScale
    from vlmexport.split.masks import BlockMasks
    from vlmexport.split.relative import RelativePositions

# Keyword arguments that steer the call and carry no tensor of the model's semantics.
_CONTROL = {
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
}
# Of capped logits, those nearer to the cap say too little of what they were.
_TOLD = 0.99
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}


class DecoderPart(nn.Module):
    """Decoder and LM head: embeddings ``[B, S, H]`` in, float logits ``[B, S, vocab]`` out (no cache).

    `blocks` says how masks follow from blocks of tokens that see each other; None for causal masks. `logit_cap`: logits
    are ``cap * tanh(logits / cap)``; 0 for logits as the head gives them. `position_axes`: 3 for M-RoPE positions.
    `deepstack_layers`: so many first layers get something added. `kv`: what it keeps from token to token; None where
    that is what the config says. `cross`: what it attends to beside its tokens, whose keys and values it is given.
    `hidden_tokens`: tokens that it never writes; None for none. `logit_scale`: what the head's logits are scaled by.
    `relative`: what its attention adds to scores; None for nothing.
    `chunks`: so many tokens make a chunk, of which each layer's see their own alone (0: all; empty: no layer has them).
    `counted`: layers whose attention computes with the number of tokens before each one.
    """

    def __init__(
        self, decoder: nn.Module, head: nn.Module, blocks: BlockMasks | None = None, logit_cap: float = 0.0
    ) -> None:
        super().__init__()
        self.position_axes = 1
        self.deepstack_layers = 0
        self.kv: KVGeometry | None = None
        self.cross: CrossAttention | None = None
        self.hidden_tokens: HiddenTokens | None = None
        self.logit_scale: LogitScale | None = None
        self.relative: RelativePositions | None = None
        self.chunks: tuple[int, ...] = ()
        self.counted: tuple[int, ...] = ()
        self.decoder = decoder
        self.head = head
        self.blocks = blocks
        self.logit_cap = logit_cap

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        deepstack_embeds: torch.Tensor | None = None,
        block_ids: torch.Tensor | None = None,
        per_layer_inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of all positions, for a right-padded or unpadded batch.

        `position_ids` int64 ``[3, B, S]`` for M-RoPE, `deepstack_embeds` ``[layers, B, S, H]``, and `block_ids` int64
        ``[B, S]`` for a part with `blocks` (`vlmexport.model.blocks`); without them everything is as for text.
        `per_layer_inputs` ``[B, S, layers, width]`` are for a decoder that takes them, which needs them always.
        """
        from vlmexport.split.deepstack import deepstack_added

        mask = self.masks(attention_mask, block_ids, inputs_embeds)
        given = {} if position_ids is None else {"position_ids": position_ids}
        given |= {} if per_layer_inputs is None else {PER_LAYER: per_layer_inputs}
        with deepstack_added(self.decoder, deepstack_embeds):
            out = self.decoder(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False, **given)
        return self.logits(out.last_hidden_state)

    def masks(self, attention_mask: torch.Tensor, block_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> Any:
        """What the decoder takes as ``attention_mask`` for new tokens ``[B, S, H]``.

        The padding ``[B, T]``, or masks that hold the blocks; without `block_ids` the new tokens are in none.
        """
        if self.blocks is None:
            return attention_mask
        if block_ids is None:
            block_ids = attention_mask.new_zeros(inputs_embeds.shape[:2])
        return self.blocks.build(block_ids, attention_mask, inputs_embeds.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of last hidden states ``[..., H]``."""
        logits: torch.Tensor = self.head(hidden)
        if self.logit_cap:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        if self.logit_scale is not None:
            logits = self.logit_scale.apply(logits)
        return logits if self.hidden_tokens is None else self.hidden_tokens.hide(logits)


@dataclass(frozen=True)
class DecoderCall:
    """One call of the decoder seen inside a full forward: its keyword arguments, and the full model's logits."""

    kwargs: dict[str, Any]
    logits: torch.Tensor

    @property
    def extras(self) -> dict[str, Any]:
        """Arguments beyond embeddings, mask and positions: the names tell the merge strategy."""
        return {k: v for k, v in self.kwargs.items() if v is not None and k not in _CONTROL | _KNOWN}


def text_decoder(model: PreTrainedModel) -> Any:
    """The module of `model` that makes the last hidden states: its decoder, without the LM head that that may have.

    Of an encoder-decoder the decoder alone.
    """
    decoder: Any = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder:
        if decoder.get_output_embeddings() is None and not decoder.config.is_encoder_decoder:
            break
        decoder = inner
    within = [child for child in decoder.children() if hasattr(child, "get_output_embeddings")]
    if decoder.get_output_embeddings() is not None and len(within) == 1:
        return within[0]  # a causal model that takes itself for its decoder
    return decoder


def capture_decoder_call(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> DecoderCall:
    """Run the full model once on `inputs` and keep what reached its `text_decoder`."""
    seen: list[dict[str, Any]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise UnsupportedModelError(f"{model.config.model_type}: the decoder is called with positional arguments")
        seen.append(dict(kwargs))

    handle = text_decoder(model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            made: Any = model(**inputs, use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UnsupportedModelError(
            f"{model.config.model_type}: the decoder ran {len(seen)} times in one forward, expected 1"
        )
    return DecoderCall(seen[0], made.embeddings if hasattr(made, "embeddings") else made.logits)


def replay(part: DecoderPart, call: DecoderCall) -> torch.Tensor:
    """Logits of the decoder and head on the captured arguments."""
    with torch.no_grad():
        out = part.decoder(**call.kwargs)
        return part.logits(out.last_hidden_state)


def find_logit_cap(part: DecoderPart, call: DecoderCall) -> float:
    """The cap that the whole model puts on the logits of its head: 0, or the one that its configuration names.

    Not every model class applies what its configuration names, so `call`'s logits decide.
    """
    cap = _named_cap(part)
    if not cap:
        return 0.0
    raw = replay(part, call)
    capped = cap * torch.tanh(raw / cap)
    near, far = ((logits - call.logits).abs().max() for logits in (capped, raw))
    return cap if near < far else 0.0


def find_capped_scale(part: DecoderPart, call: DecoderCall) -> tuple[LogitScale, float] | None:
    """The scale and cap of a model that caps scaled logits; None for others.

    ``cap * tanh(factor * logits / cap)`` is what a cap of ``cap / factor`` gives, times `factor`.
    """
    from vlmexport.split.logits import find_logit_scale

    cap, before = _named_cap(part), part.logit_cap
    if not cap:
        return None
    part.logit_cap = 0.0
    raw = replay(part, call)
    part.logit_cap = before
    if raw.shape != call.logits.shape:
        return None
    told = call.logits.abs() < _TOLD * cap
    uncapped = cap * torch.atanh(call.logits[told] / cap)
    scale = find_logit_scale(part.decoder.config, raw[told], uncapped)
    return None if scale is None else (scale, cap * scale.factor if scale.divides else cap / scale.factor)


def _named_cap(part: DecoderPart) -> float:
    """The cap on logits that the configuration names; 0 for none."""
    config: Any = part.decoder.config
    return float(getattr(config.get_text_config(), "final_logit_softcapping", None) or 0.0)
