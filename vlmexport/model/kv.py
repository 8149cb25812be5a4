"""Geometry and memory of the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVGeometry:
    """Shape of the cache: per layer one key and one value tensor ``[batch, heads, length, head_dim]``."""

    layers: int
    heads: int
    head_dim: int

    def bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Cache bytes for one token of one sequence: ``2 * layers * heads * head_dim * bytes_per_value``."""
        return 2 * self.layers * self.heads * self.head_dim * bytes_per_value
