"""Decoders that attend to states beside their own tokens: where they do it, and the decoder part with keys given.

A text encoder's result, or image features: keys and values of such states do not change from token to token, so they
are computed once for each prompt and are inputs of the decoder from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.cross import TILE_MASK, cross_names, reached_tiles
from vlmexport.model.kv import KVGeometry, LayerKV
from vlmexport.split.attention import attention_implementation, plain_attention
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.layers import find_layers

# The arguments by which transformers' decoders take such states: of a text encoder, and of images.
STATES = ("encoder_hidden_states", "cross_attention_states")
_TOKENS, _STATES = 2, 5


@dataclass(frozen=True)
class CrossAttention:
    """What a decoder attends to beside its tokens: the argument `states` ``[B, T, width]`` of its forward.

    `modules` are the attentions that do it, by layer, and `kept` the shape of their keys and values ``[B, heads, T,
    head_dim]``. `tile_tokens`: the mask says for each token which tiles of so many states it sees; 0 where it says
    which states are no padding, for all tokens alike.
    """

    states: str
    width: int
    modules: Mapping[int, nn.Module]
    kept: Mapping[int, LayerKV]
    tile_tokens: int = 0

    @property
    def names(self) -> dict[str, LayerKV]:
        """The decoder graph's inputs of keys and values, in order."""
        return {name: kept for layer, kept in self.kept.items() for name in cross_names(layer)}

    def layer_of(self, module: nn.Module) -> int | None:
        """The layer whose cross-attention `module` is."""
        return next((layer for layer, found in self.modules.items() if found is module), None)

    def arguments(self, states: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        """The decoder's arguments for `states` ``[B, T, width]`` and a mask (`CrossDecoder.forward`)."""
        given: dict[str, Any] = {self.states: states}
        if self.tile_tokens and mask is not None:
            seen, rows = reached_tiles(mask, self.tile_tokens)
            bias = torch.zeros(seen.shape, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)
            return {**given, TILE_MASK: bias, "full_text_row_masked_out_mask": rows.to(states.dtype)}
        return given if mask is None else {**given, "encoder_attention_mask": mask}


@dataclass
class _Probe:
    """What reached the attentions of one run: modules by layer, those of tokens and those of states."""

    own: dict[int, LayerKV] = field(default_factory=dict)
    cross: dict[int, LayerKV] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)

    def attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """Attention as PyTorch computes it; its keys are noted."""
        kept = LayerKV(key.shape[1], key.shape[3])
        if key.shape[2] == _STATES:
            self.modules[module.layer_idx], self.cross[module.layer_idx] = module, kept
        else:
            self.own[module.layer_idx] = kept
        return plain_attention(module, query, key, value, mask, **kwargs)


def find_cross(
    family: str, decoder: Any, states: str, width: int, tile_tokens: int
) -> tuple[CrossAttention, KVGeometry]:
    """Run `decoder` on a few tokens and a few states, and see which attentions have keys of the states.

    Returns those, and what the decoder keeps of its own tokens. Raises `UnsupportedModelError` when none has.
    """
    probe, layers = _Probe(), len(find_layers(decoder)[1])
    hidden = decoder.config.get_text_config().hidden_size
    embeds = torch.zeros(1, _TOKENS, hidden, dtype=decoder.dtype)
    given = {states: torch.zeros(1, _STATES, width, dtype=decoder.dtype)}
    with torch.no_grad(), attention_implementation(decoder, "vlmexport_probe", probe.attend):
        decoder(inputs_embeds=embeds, use_cache=False, **given)
    if not probe.cross or not probe.own:
        raise UnsupportedModelError(f"{family}: no attention of the decoder has keys of {states}")
    found = CrossAttention(states, width, probe.modules, dict(sorted(probe.cross.items())), tile_tokens)
    per_layer = tuple(probe.own.get(index) for index in range(layers))
    first = next(kept for kept in per_layer if kept is not None)
    uniform = all(kept == first for kept in per_layer)
    return found, KVGeometry(layers, first.heads, first.head_dim, () if uniform else per_layer)


class CrossDecoder(DecoderPart):
    """A `DecoderPart` that is given the keys and values of its cross-attention."""

    def __init__(self, decoder: nn.Module, head: nn.Module, cross: CrossAttention) -> None:
        super().__init__(decoder, head)
        self.cross: CrossAttention = cross

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits of all positions; `given` are the keys and values by their graph inputs, and the mask.

        ``encoder_attention_mask`` int64 ``[B, T]``, 1 for states that are no padding; or ``cross_attention_mask`` int64
        ``[B, S, tiles]`` (`vlmexport.model.cross.reached_tiles`).
        """
        key_values = {name: given[name] for name in self.cross.names}
        key = next(iter(key_values.values()))
        states = inputs_embeds.new_zeros(key.shape[0], key.shape[2], self.cross.width)
        mask = given[TILE_MASK if self.cross.tile_tokens else "encoder_attention_mask"]
        with given_keys(self.decoder, self.cross, key_values):
            out = self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                use_cache=False,
                **self.cross.arguments(states, mask),
            )
        return self.logits(out.last_hidden_state)


@contextmanager
def given_keys(decoder: Any, cross: CrossAttention, key_values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within, the cross-attentions of `decoder` have the keys and values of `key_values`."""

    def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        layer = cross.layer_of(module)
        if layer is not None:
            key, value = (key_values[name] for name in cross_names(layer))
        return plain_attention(module, query, key, value, mask, **kwargs)

    with attention_implementation(decoder, "vlmexport_given", attend):
        yield


class CrossKeys:
    """The keys and values of every cross-attention for given states, by the model's own modules."""

    def __init__(self, decoder: Any, cross: CrossAttention) -> None:
        self.decoder, self.cross = decoder, cross
        self._calls = self._record()

    def _record(self) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
        """How each module is called, with `_TOKENS` of its own and `_STATES` states."""
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(layer: int) -> Any:
            return lambda _module, args, kwargs: calls.update({layer: (args, kwargs)})

        handles = [m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in self.cross.modules.items()]
        hidden = self.decoder.config.get_text_config().hidden_size
        embeds, states = torch.zeros(1, _TOKENS, hidden), torch.zeros(1, _STATES, self.cross.width)
        dtype = self.decoder.dtype
        try:
            with torch.no_grad():
                given = self.cross.arguments(states.to(dtype), None)
                self.decoder(inputs_embeds=embeds.to(dtype), use_cache=False, **given)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def __call__(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keys and values ``[B, heads, T, head_dim]`` of `states` ``[B, T, width]`` by graph input."""
        found: dict[str, torch.Tensor] = {}

        def attend(module: nn.Module, query: Any, key: Any, value: Any, _mask: Any, **_kwargs: Any) -> Any:
            layer = self.cross.layer_of(module)
            if layer is not None:
                found.update(zip(cross_names(layer), (key, value), strict=True))
            # What follows is computed from this and read by nothing.
            return query.transpose(1, 2), None

        with attention_implementation(self.decoder, "vlmexport_keys", attend):
            for layer, module in self.cross.modules.items():
                args, kwargs = self._calls[layer]
                module(*(_swap(a, states) for a in args), **{n: _swap(a, states) for n, a in kwargs.items()})
        return {name: found[name] for name in self.cross.names}


def _swap(value: Any, states: torch.Tensor) -> Any:
    """An argument of a recorded call for other states: those, one token of zeros, and no masks."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim == 3 and value.shape[1] == _STATES:
        return states
    return states.new_zeros(states.shape[0], 1, value.shape[-1]) if value.ndim == 3 else None
