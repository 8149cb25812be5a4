"""Stand in for the attention of a transformers model: to look at what reaches it, or to compute something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers' attention functions take beside queries, keys, values and masks, and that changes the result.
_CHANGES = {
    "position_bias": "learned relative positions added to its scores",
    "s_aux": "attention sinks",
    "softcap": "capped scores",
}


def refuse_changed_scores(
    module: nn.Module, settings: Mapping[str, Any], written: frozenset[str] = frozenset()
) -> None:
    """Refuse an attention of `module` that gets more `settings` than the operator that stands for it can say.

    `written` are the keywords that the operator does say. Raises `UnsupportedModelError`: left out without a word, they
    would give another model.
    """
    for name, what in _CHANGES.items():
        if name not in written and settings.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__}: its attention has {what} ({name}), which vlmexport writes into no graph; "
                f"a model with it cannot be exported"
            )


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str, function: Any) -> Iterator[None]:
    """Run `model` with `function` as its attention, with real 4-D additive masks, and restore it afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def plain_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """Attention as transformers computes it, for `attention_implementation`.

    q ``[B, N, S, D]``, k and v ``[B, M, T, D]``, result ``[B, S, N, D]``. PyTorch's own operator knows no softcap:
    with one it is computed step by step.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    cap = kwargs.pop("softcap", None)
    if cap is None:
        result: tuple[torch.Tensor, Any] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return result
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scale = kwargs.get("scaling")
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)
    weights = (scores if mask is None else scores + mask).float().softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None
