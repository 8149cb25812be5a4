"""Llama 4, which llama.cpp (b11549) runs on pictures in another order of tokens than the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from vlmexport.errors import UnsupportedModelError

# Measured on a tiny checkpoint at F16: 0.69 relative error of the picture's embeddings as they come, 0.0012 once rows
# and columns are exchanged, and a divergence of 5e-3 nats of the logits.
_REASON = (
    "llama4: llama.cpp (b11549) hands the tokens of a tile over column by column where the model was trained on rows "
    "(its pixel shuffle, tools/mtmd/models/llama4.cpp, leaves the last transposition out), so its answers are others"
)


def text(config: Any, names: Sequence[str]) -> NoReturn:
    """Raise `UnsupportedModelError` with the reason."""
    raise UnsupportedModelError(_REASON)


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> NoReturn:
    """Raise `UnsupportedModelError` with the reason."""
    raise UnsupportedModelError(_REASON)
