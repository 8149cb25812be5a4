"""The decoder as a part: the language model with its LM head, and a look at what reaches it and its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keyword arguments that steer the call and carry no tensor of the model's semantics.
_CONTROL = {"past_key_values", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}


class DecoderPart(nn.Module):
    """Decoder and LM head: embeddings ``[B, S, H]`` in, float logits ``[B, S, vocab]`` out (no cache)."""

    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of all positions, for a right-padded or unpadded batch."""
        out = self.decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        logits: torch.Tensor = self.head(out.last_hidden_state)
        return logits


@dataclass(frozen=True)
class DecoderCall:
    """One call of the decoder seen inside a full forward: its keyword arguments, and the full model's logits."""

    kwargs: dict[str, Any]
    logits: torch.Tensor

    @property
    def extras(self) -> dict[str, Any]:
        """Arguments beyond embeddings, mask and positions: the names tell the merge strategy."""
        return {k: v for k, v in self.kwargs.items() if v is not None and k not in _CONTROL | _KNOWN}


def capture_decoder_call(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> DecoderCall:
    """Run the full model once on `inputs` and keep what reached ``model.get_decoder()``."""
    seen: list[dict[str, Any]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise UnsupportedModelError(f"{model.config.model_type}: the decoder is called with positional arguments")
        seen.append(dict(kwargs))

    handle = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UnsupportedModelError(
            f"{model.config.model_type}: the decoder ran {len(seen)} times in one forward, expected 1"
        )
    return DecoderCall(seen[0], logits)


def replay(part: DecoderPart, call: DecoderCall) -> torch.Tensor:
    """Logits of the decoder and head on the captured arguments."""
    with torch.no_grad():
        out = part.decoder(**call.kwargs)
        logits: torch.Tensor = part.head(out.last_hidden_state)
    return logits


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str, function: Any) -> Iterator[None]:
    """Run `model` with `function` as its attention, with real 4-D additive masks, and restore it afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_masks_are_causal(part: DecoderPart, call: DecoderCall, family: str) -> None:
    """Refuse a decoder whose layers see anything but a causal mask (windows come with their own argument).

    Looks at the mask that transformers built for each layer, image positions included.
    Raises `UnsupportedModelError` naming the family and the first layer that differs.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def look(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if attention_mask is not None and not _is_causal(attention_mask, kwargs.get("sliding_window")):
            raise UnsupportedModelError(
                f"{family}: layer {getattr(module, 'layer_idx', '?')} uses a mask that is not causal "
                "(image blocks or prefixes see each other); this decoder form is not supported yet"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    decoder: Any = part.decoder
    with attention_implementation(decoder, "vlmexport_look", look):
        replay(part, call)


def _is_causal(mask: torch.Tensor, window: int | None) -> bool:
    """True when the additive mask ``[B, 1, S, T]`` is exactly the causal one, cut to `window` when given."""
    visible = mask == 0
    length, total = mask.shape[-2:]
    query = torch.arange(length).unsqueeze(1) + (total - length)
    keys = torch.arange(total).unsqueeze(0)
    expected = keys <= query
    if window is not None:
        expected &= keys > query - window
    return bool((visible == expected).all())
