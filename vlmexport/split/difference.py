"""How far a replay may be from the whole model: rounding only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.logits import shown

if TYPE_CHECKING:
    import torch

    from vlmexport.model.load import VLM

# Replayed logits may differ from the full model's by rounding only.
REPLAY_LIMIT = 1e-5


def refuse_difference(vlm: VLM, what: str, got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value; raises `UnsupportedModelError` above `REPLAY_LIMIT` or for other shapes.

    `what` is replayed, in the plural.
    """
    if got.shape != expected.shape:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the replayed {what} have shape {tuple(got.shape)}, "
            f"the model's {tuple(expected.shape)}"
        )
    got, expected = shown(got), shown(expected)
    scale = expected.float().abs().max().clamp_min(1e-12)
    difference = float((got.float() - expected.float()).abs().max() / scale)
    if not difference <= REPLAY_LIMIT:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the replayed {what} differ from the full model by {difference:.2e} (limit "
            f"{REPLAY_LIMIT:.0e}); this family needs a family module, which this version does not have"
        )
    return difference
