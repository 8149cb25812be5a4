"""States of fixed size that a decoder's layers keep: found in a cache, and counted by a stand-in for one.

transformers' layers that keep no keys and values ask a cache for the last inputs of their convolution
(``update_conv_state``) and for the matrix of their linear attention (``update_recurrent_state``).
"""

from __future__ import annotations

from typing import Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.kv import State

_CONV_AXES, _RECURRENT_AXES = 3, 4  # [1, channels, kernel] and [1, heads, key dim, value dim]


def kept_states(what: str, index: int, layer: Any) -> tuple[State, ...]:
    """The states in `layer`, the cache's entry for decoder layer `index` after a call with a batch of one.

    `what` names the layer in the `UnsupportedModelError` that is raised for states of another form: several of a kind,
    or of other shapes than ``[1, channels, kernel]`` and ``[1, heads, key dim, value dim]``.
    """
    found = []
    for kind, axes in (("conv", _CONV_AXES), ("recurrent", _RECURRENT_AXES)):
        held = [t for t in getattr(layer, f"{kind}_states", {}).values() if isinstance(t, torch.Tensor)]
        if not held:
            continue
        if len(held) > 1 or held[0].ndim != axes or held[0].shape[0] != 1:
            raise UnsupportedModelError(
                f"{what} of the decoder keeps {kind} states of the shapes {[tuple(t.shape) for t in held]}, expected "
                f"one with {axes} axes and a batch of 1; such layers are not supported yet"
            )
        # Linear attention sums over all tokens so far: its state is float32 whatever the checkpoint's type.
        found.append(State(index, kind, tuple(held[0].shape[1:]), "float32" if kind == "recurrent" else ""))
    return tuple(found)


def keeps_states(decoder: Any) -> bool:
    """Does transformers make a cache with states for some layer of `decoder`?"""
    from transformers import DynamicCache

    return any(hasattr(layer, "conv_states") for layer in DynamicCache(config=decoder.config).layers)
