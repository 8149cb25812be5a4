"""SmoothQuant: share the inputs' outliers between inputs and weights, so that both fit 8 bits (arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmexport.quantize.statistics import InputStatistics

_FLOOR = 1e-5


def smooth_scale(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, alpha: float = 0.5
) -> torch.Tensor | None:
    """Factors ``s [K] = max|x|^alpha / max|w|^(1 - alpha)`` (eq. 4) for all ``weights [N_i, K]``; float32, positive.

    The caller stores ``W * s`` and divides the input by `s`. A feature that is silent, or that no weight reads, keeps
    1. None when that leaves nothing to move.
    """
    weight = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    live = (statistics.maximum > 0) & (weight > 0)
    if not bool(live.any()):
        return None
    scale = statistics.maximum.clamp_min(_FLOOR) ** alpha / weight.clamp_min(_FLOOR) ** (1 - alpha)
    return torch.where(live, scale.clamp_min(_FLOOR), torch.ones_like(scale))
