"""The repeated layers of a decoder: where they are, which are alike, and how to stand in for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError


def find_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The attribute and the list of the decoder's repeated layers.

    Raises `UnsupportedModelError` when no direct child is a list of as many modules as the configuration has layers
    (those of the decoder, where it counts them apart from an encoder's).
    """
    config: Any = decoder.config
    text = config.get_text_config()
    count = text.num_hidden_layers
    counts = {count, getattr(text, "decoder_layers", count), getattr(text, "num_decoder_layers", count)}
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) in counts:
            return name, child
    raise UnsupportedModelError(
        f"{type(decoder).__name__} has no list of {count} layers; its decoder cannot be repeated"
    )


def layer_kinds(layers: nn.ModuleList) -> tuple[int, ...]:
    """For each layer the first layer that is alike in classes, settings and shapes (all but the layer's own index)."""
    first: dict[Any, int] = {}
    return tuple(first.setdefault(_layer_signature(layer, index), index) for index, layer in enumerate(layers))


def _layer_signature(layer: nn.Module, index: int) -> tuple[Any, ...]:
    rows = []
    for path, module in layer.named_modules():
        scalars = {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, int | float | bool | str | tuple | type(None)) and k not in ("layer_idx", "training")
        }
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        rows.append((path, type(module), repr(sorted(scalars.items())), repr(shapes)))
    return tuple(rows)


def stored_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of `module` itself that a checkpoint holds, by name."""
    left_out = module._non_persistent_buffers_set
    return {name: held for name, held in module.named_buffers(recurse=False) if name not in left_out}


def layer_buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    """`stored_buffers` of all modules of a layer, by their name in it."""
    return {
        f"{path}.{name}" if path else name: held
        for path, module in layer.named_modules()
        for name, held in stored_buffers(module).items()
    }


@contextmanager
def overridden(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, calling `module` runs `forward` instead of its class's own."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
