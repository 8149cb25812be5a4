"""Attention that asks the cache how many tokens it holds: what it computes depends on a token's place in its row.

transformers gives such a layer one number for all rows of a batch. For rows of their own lengths, the rows are put one
behind the other into one row, in which every token has its own place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.attention import attention_implementation
from vlmexport.split.layers import overridden
from vlmexport.split.per_layer import text_arguments

_TOKENS = 3
# Two rows, of which one is so far into a text that any slow change with the place shows.
_FIRST = (0, 1_000_003)
_LIMIT = 16  # in the smallest steps of the type that the model computes in
_CACHE = "past_key_values"
Attend = Callable[..., tuple[Any, Any]]


@dataclass
class CountedRows:
    """Runs `modules` (attentions) on rows whose tokens have the places `positions`, int64 ``[B, S]``."""

    modules: Sequence[nn.Module]
    positions: torch.Tensor | None = None
    running: dict[nn.Module, tuple[Any, Any]] = field(default_factory=dict)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within, the modules take their tokens' places from `positions`."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(overridden(module, self._forward(module)))
            yield

    def attending(self, attend: Attend) -> Attend:
        """`attend`, a function for transformers' AttentionInterface, which gets the rows of the modules apart again."""

        def run(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, Any]:
            if module not in self.running:
                return attend(module, query, key, value, mask, **kwargs)
            batch, length = self.running[module]
            apart = (t.reshape(t.shape[1], batch, length, t.shape[3]).transpose(0, 1) for t in (query, key, value))
            out, weights = attend(module, *apart, mask, **kwargs)
            return out.reshape(1, batch * length, *out.shape[2:]), weights

        return run

    def _forward(self, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            given = _named(forward, args, kwargs)
            name, hidden = next(iter(given.items()))
            batch, length, width = hidden.shape
            if self.positions is None:
                raise ValueError("the places of the tokens are not known yet")
            count = self.positions.reshape(-1) - torch.arange(batch * length)
            given |= {name: hidden.reshape(1, batch * length, width), _CACHE: _Counter(count)}
            self.running[module] = batch, length
            try:
                out = forward(**given)
            finally:
                del self.running[module]
            if isinstance(out, tuple):
                return (out[0].reshape(batch, length, -1), *out[1:])
            return out.reshape(batch, length, -1)

        return run


def find_counted(family: str, decoder: Any, start: int, axes: int) -> tuple[int, ...]:
    """The layers (`layer_idx`) of `decoder` whose attention asks the cache for its length, which `CountedRows` runs.

    `start` is the position of a prompt's first token, `axes` on how many axes positions count. Raises
    `UnsupportedModelError` naming the first layer that computes something else with its rows in one.
    """
    asked = _asking(decoder)
    for module, kwargs in asked.items():
        what = f"{family}: layer {module.layer_idx} of the decoder asks its cache for the number of tokens"
        if start or axes > 1:
            raise UnsupportedModelError(f"{what}, and positions are not places in the text; this is not supported yet")
        if not _reproduced(decoder, module, kwargs):
            raise UnsupportedModelError(f"{what} and computes more with it than can be done for rows of other lengths")
    return tuple(sorted(int(module.layer_idx) for module in asked))


def counted_modules(decoder: nn.Module, layers: Sequence[int]) -> tuple[nn.Module, ...]:
    """The attentions of `decoder` that `layers` names, as `find_counted` gives them."""
    return tuple(module for module in _attentions(decoder) if module.layer_idx in layers)


class _Counter:
    """Stands for a cache that holds `count` tokens and gives none of them."""

    def __init__(self, count: Any) -> None:
        self.count = count

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> Any:
        """`count`."""
        return self.count

    def update(self, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """The new keys and values alone."""
        return key, value


def _attentions(decoder: nn.Module) -> list[Any]:
    return [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")]


def _asking(decoder: Any) -> dict[Any, dict[str, Any]]:
    """The attentions that ask a cache for its length by themselves, and the arguments of each one's call."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=decoder.config)
    length, calls = cache.get_seq_length, dict[Any, tuple[Any, Any]]()
    running: list[nn.Module] = []
    asking: set[nn.Module] = set()

    def noted(*args: Any, **kwargs: Any) -> Any:
        asking.update(running[-1:])
        return length(*args, **kwargs)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(module)
        calls[module] = args, kwargs

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        running.pop()

    cache.get_seq_length = noted
    handles: list[Any] = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in _attentions(decoder)]
    handles += [m.register_forward_hook(leave) for m in _attentions(decoder)]
    embeds = torch.zeros(1, _TOKENS, decoder.config.get_text_config().hidden_size, dtype=decoder.dtype)
    given = text_arguments(decoder, 1, _TOKENS)
    try:
        with torch.no_grad():
            decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **given)
    finally:
        for handle in handles:
            handle.remove()
    return {module: _named(module.forward, *call) for module, call in calls.items() if module in asking}


def _reproduced(decoder: Any, module: Any, given: dict[str, Any]) -> bool:
    """Do rows in one give the queries, keys and values that each row gives behind so many tokens?"""
    name, hidden = next(iter(given.items()))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(_FIRST), *hidden.shape[1:], generator=generator).to(hidden.dtype)
    seen: list[tuple[Any, ...]] = []

    def keep(_module: Any, query: Any, key: Any, value: Any, _mask: Any, **_kwargs: Any) -> tuple[Any, None]:
        seen.append((query, key, value))
        return query.transpose(1, 2), None

    places = torch.tensor(_FIRST)[:, None] + torch.arange(hidden.shape[1])
    together = CountedRows([module], places)
    with torch.no_grad(), attention_implementation(decoder, "vlmexport_counted", together.attending(keep)):
        try:
            for row, count in zip(rows, _FIRST, strict=True):
                module(**{**given, name: row[None], _CACHE: _Counter(count)})
            with together.counted():
                module(**{**given, name: rows})
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):  # it asks the cache for more
            return False
    alone = [torch.cat(parts) for parts in zip(*seen[: len(_FIRST)], strict=True)]
    return all(_close(got, wanted) for got, wanted in zip(seen[-1], alone, strict=True))


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `function`, all by name, the first one first."""
    given = zip(inspect.signature(function).parameters, args, strict=False)
    first = next(iter(inspect.signature(function).parameters))
    named = {**dict(given), **kwargs}
    return {first: named.pop(first), **named}


def _close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    limit = _LIMIT * torch.finfo(wanted.dtype).eps * wanted.float().abs().max()
    return got.shape == wanted.shape and bool((got.float() - wanted.float()).abs().max() <= limit)
