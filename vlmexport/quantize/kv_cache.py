"""The INT8 key-value cache: one scale per layer, key-value head and channel, fixed before the graph is written.

A cached value ``x`` is stored as ``clamp(round(x * (1 / scale)), -128, 127)``, ties to even, in float32: the arithmetic
of onnxruntime's GroupQueryAttention 1.31 on the CPU with PER_CHANNEL scales, found bit for bit (docs/decisions/0033).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vlmexport.errors import BadInputError

# Largest value seen times this is the largest that fits: room for prompts that were not in the samples.
MARGIN = 1.1
_LARGEST_CODE = 127
# A channel that was silent on every sample still gets a step: this share of its head's largest one.
_SMALLEST_SHARE = 1e-4


@dataclass(frozen=True)
class LayerPeaks:
    """What one layer's cache reached over all samples, float32.

    Keys are cached after rotary embedding, which turns pairs of channels by an angle that grows with the position: a
    channel's own largest value would depend on how long the samples were, the length of its pair does not. Which
    channels are pairs is for the emitter to know, so both are kept: `half` ``[heads, head_dim / 2]`` for the pairs
    ``(d, d + head_dim / 2)``, `interleaved` likewise for ``(2 d, 2 d + 1)``. `value`: ``[heads, head_dim]``.
    """

    half: torch.Tensor
    interleaved: torch.Tensor
    value: torch.Tensor

    @staticmethod
    def of(key: torch.Tensor, value: torch.Tensor) -> LayerPeaks:
        """The peaks of keys and values ``[heads, tokens, head_dim]`` (valid tokens only)."""
        one, other = key.float().chunk(2, dim=-1)
        even, odd = key.float()[..., ::2], key.float()[..., 1::2]
        return LayerPeaks(torch.hypot(one, other).amax(1), torch.hypot(even, odd).amax(1), value.float().abs().amax(1))

    def joined(self, other: LayerPeaks) -> LayerPeaks:
        """The peaks over the samples of both."""
        return LayerPeaks(
            torch.maximum(self.half, other.half),
            torch.maximum(self.interleaved, other.interleaved),
            torch.maximum(self.value, other.value),
        )

    def key_scale(self, interleaved: bool) -> torch.Tensor:
        """Scales of the keys, float32 ``[1, heads, 1, head_dim]``; `interleaved` says which channels are pairs."""
        peaks = self.interleaved.repeat_interleave(2, -1) if interleaved else torch.cat([self.half, self.half], -1)
        return _scale(peaks)

    def value_scale(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Scales of the values, float32 ``[1, heads, 1, head_dim]``.

        `rows` ``[heads * head_dim]`` are the factors that a fold put on the rows of the value projection.
        """
        return _scale(self.value if rows is None else self.value * rows.abs().reshape(self.value.shape))


@dataclass(frozen=True)
class CachePeaks:
    """The peaks of every layer, in order."""

    layers: tuple[LayerPeaks, ...]

    @staticmethod
    def over(samples: Iterable[Sequence[LayerPeaks]]) -> CachePeaks:
        """Join the samples' peaks (each with all layers); raises `BadInputError` without samples and for NaN."""
        joined: list[LayerPeaks] = []
        for sample in samples:
            joined = [a.joined(b) for a, b in zip(joined, sample, strict=True)] if joined else list(sample)
        if not joined:
            raise BadInputError("an INT8 KV cache needs at least one calibration sample to choose its scales from")
        for index, layer in enumerate(joined):
            if not all(bool(t.isfinite().all()) for t in (layer.half, layer.value)):
                raise BadInputError(f"layer {index}: keys or values of a calibration sample are NaN or infinite")
        return CachePeaks(tuple(joined))


def scales_digest(scales: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the float32 bytes of the scales: layer 0's keys, layer 0's values, layer 1's keys and so on."""
    digest = hashlib.sha256()
    for scale in scales:
        digest.update(scale.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _scale(peaks: torch.Tensor) -> torch.Tensor:
    floor = peaks.amax(-1, keepdim=True) * _SMALLEST_SHARE
    scale = torch.maximum(peaks, floor) * (MARGIN / _LARGEST_CODE)
    return torch.where(scale > 0, scale, torch.ones_like(scale))[None, :, None, :]
