"""Image features as rows: what `get_image_features` of any family gives, in the order of the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def feature_rows(output: Any, deepstack_layers: int) -> torch.Tensor:
    """Rows ``[image_tokens, (1 + deepstack_layers) * hidden]`` of what ``get_image_features`` returned.

    The first `hidden` values of a row replace the embedding; each further `hidden` are for one early decoder layer.
    """
    rows = [_joined(getattr(output, "pooler_output", output))]
    if deepstack_layers:
        rows += [_joined(level) for level in output.deepstack_features[:deepstack_layers]]
    return torch.cat(rows, dim=1)


def _joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """``[rows, hidden]`` of one tensor of any rank, or of one for each picture."""
    rows = list(features) if isinstance(features, list | tuple) else [features]
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
