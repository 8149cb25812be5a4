"""Which layers of a decoder compute alike, shown by running one in the other's place."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from vlmexport.split.attention import attention_implementation, plain_attention
from vlmexport.split.layers import layer_buffers, layer_kinds
from vlmexport.split.per_layer import PER_LAYER_ARGUMENT, text_arguments

if TYPE_CHECKING:
    from vlmexport.split.cross import CrossAttention

_PROBE_TOKENS = 8
_SCALARS = (int, float, bool, str, type(None))


def proven_kinds(decoder: Any, layers: nn.ModuleList, cross: CrossAttention | None = None) -> tuple[int, ...]:
    """`layer_kinds`, kept only where a layer's first alike one, given its weights, computes the same in a run.

    The decoder runs once on random embeddings. A layer stands for itself when the others' code gives another result
    with its weights, calls attention with other settings, or is called with other arguments beside the hidden state
    (another mask or rotary table): what its index or its config decide is seen so, whatever they are called. `cross`
    attentions get random states.
    """
    kinds = layer_kinds(layers)
    watch = _Watch(layers, kinds)
    hidden = decoder.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, _PROBE_TOKENS, hidden, generator=generator).to(decoder.dtype)
    given = text_arguments(decoder, 1, _PROBE_TOKENS)
    if cross is not None:
        states = torch.randn(1, _PROBE_TOKENS + 1, cross.width, generator=generator).to(decoder.dtype)
        given = {**given, **cross.arguments(states, None)}
    handles = [layer.register_forward_hook(watch.compare, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), attention_implementation(decoder, "vlmexport_kinds", watch.attend):
            decoder(inputs_embeds=embeds, use_cache=False, **given)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(kind if index in watch.alike else index for index, kind in enumerate(kinds))


@dataclass
class _Call:
    """One call of a layer: its arguments but for the hidden state, and the settings that reached attention."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    settings: list[Any]

    def equals(self, other: _Call) -> bool:
        if (self.spec, self.settings) != (other.spec, other.settings):
            return False
        return all(_equal(a, b) for a, b in zip(self.leaves, other.leaves, strict=True))


@dataclass
class _Watch:
    """Compares every layer of a run with the one that is to stand for it; `alike` are those that it can stand for."""

    layers: nn.ModuleList
    kinds: tuple[int, ...]
    alike: set[int] = field(default_factory=set)
    calls: dict[int, _Call] = field(default_factory=dict)
    settings: list[Any] = field(default_factory=list)
    comparing: bool = False

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """Attention as PyTorch computes it; what steers it is noted."""
        self.settings += [(k, v) for k, v in sorted(kwargs.items()) if isinstance(v, _SCALARS)]
        return plain_attention(module, query, key, value, mask, **kwargs)

    def compare(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Hook of a layer that has just run."""
        if self.comparing:
            return
        index = next(i for i, other in enumerate(self.layers) if other is layer)
        kind = self.kinds[index]
        self.calls[index] = self._call(layer, args, kwargs)
        if index == kind or kind not in self.calls:
            return
        # Buffers that no checkpoint holds stay behind: a repeated layer has those of the first.
        weights: dict[str, torch.Tensor] = {**dict(layer.named_parameters()), **layer_buffers(layer)}
        self.comparing = True
        try:
            other = torch.func.functional_call(self.layers[kind], weights, args, kwargs)
        finally:
            self.comparing = False
        again = self._call(layer, args, kwargs)
        same = all(_equal(a, b) for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(other), strict=True))
        if same and again.equals(self.calls[index]) and self.calls[index].equals(self.calls[kind]):
            self.alike.add(index)

    def _call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        settings, self.settings = self.settings, []
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        given: dict[Any, Any] = {**dict(enumerate(args)), **dict(zip(names, args, strict=False)), **kwargs}
        own = {0, names[0], PER_LAYER_ARGUMENT} | {i for i, _ in enumerate(args) if i < len(names)}
        leaves, spec = pytree.tree_flatten({name: value for name, value in given.items() if name not in own})
        return _Call(leaves, spec, settings)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return bool(one is other or one == other)
