"""Features that early decoder layers get added at the image tokens (DeepStack, arXiv:2406.04334)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vlmexport.split.layers import find_layers, overridden


@contextmanager
def deepstack_added(decoder: nn.Module, embeds: torch.Tensor | None) -> Iterator[None]:
    """Within, the result of decoder layer i has ``embeds[i]`` ``[B, S, H]`` added to it, as far as `embeds` go.

    None changes nothing.
    """
    with ExitStack() as stack:
        if embeds is not None:
            layers = find_layers(decoder)[1]
            for layer, added in zip(layers, embeds, strict=False):
                stack.enter_context(overridden(layer, _adding(layer, added)))
        yield


@contextmanager
def deepstack_seen(model: Any, instead: Any = None) -> Iterator[list[torch.Tensor]]:
    """Within, what the image encoder of `model` gives for early decoder layers, ``[rows, hidden]`` each, is kept.

    What comes after the encoder gets `instead` for each of them, where it is given.
    """
    found: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        levels = getattr(output, "deepstack_features", None) or []
        found[:] = levels
        if levels and instead is not None:
            output.deepstack_features = [instead] * len(levels)

    handle = model.get_encoder("image").register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _adding(layer: nn.Module, added: torch.Tensor) -> Callable[..., Any]:
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    return run
