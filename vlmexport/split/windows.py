"""Layers that see a window of their last tokens, found in the cache that transformers makes for them."""

from __future__ import annotations

from typing import Any


def shortest_window(decoder: Any) -> int | None:
    """Tokens of the shortest window of a layer of `decoder`; None where every layer sees all tokens."""
    from transformers import DynamicCache

    layers = DynamicCache(config=decoder.config).layers
    windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    return min((int(window) for window in windows if window), default=None)
