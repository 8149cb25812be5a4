"""Learned relative positions: an embedding of the distance between query and key, added to the scores of attention.

Which distances share a row of the embedding (a bucket) is read off a run of the model itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.attention import attention_implementation, plain_attention

# Distances that are looked at. From the middle on they must all share one bucket, as those beyond do then.
_LOOKED_AT = 1024
_FEW = 7


@dataclass(frozen=True, eq=False)
class RelativePositions:
    """What every attention of a stack to its own tokens adds: row ``buckets[distance + far]`` of `embedding`.

    The distance is the key's place less the query's, between ``-far`` and ``far``. `buckets` int64 ``[2 * far + 1]``,
    `embedding` ``[buckets, heads]``.
    """

    embedding: nn.Embedding
    buckets: torch.Tensor

    @property
    def far(self) -> int:
        """Keys that are as far away as this, and those beyond, are all the same."""
        return len(self.buckets) // 2

    def bias(self, queries: Any, keys: Any) -> torch.Tensor:
        """The summand ``[1, heads, queries, keys]`` for so many tokens that begin at the same place."""
        distances = torch.arange(keys)[None] - torch.arange(queries)[:, None]
        found: torch.Tensor = self.embedding(self.buckets[distances.clamp(-self.far, self.far) + self.far])
        return found.permute(2, 0, 1)[None]


class _SeenError(Exception):
    """Ends a run when the first attention has been seen."""


@dataclass
class _Look:
    """The summands of attentions, in order, and what embeddings of whole numbers in two axes gave."""

    summands: list[torch.Tensor | None] = field(default_factory=list)
    looked_up: list[tuple[nn.Embedding, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    only_first: bool = False

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """Attention as PyTorch computes it."""
        self.summands.append(kwargs.get("position_bias"))
        if self.only_first:
            raise _SeenError
        return plain_attention(module, query, key, value, mask, **kwargs)

    def keep(self, module: nn.Embedding, args: tuple[Any, ...], out: torch.Tensor) -> None:
        """Hook of an embedding."""
        ids = args[0] if args else None
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.shape[0] == ids.shape[1]:
            self.looked_up.append((module, ids, out))


def find_relative(family: str, stack: Any, states: dict[str, Any] | None = None) -> RelativePositions | None:
    """The learned relative positions of `stack` (a text encoder, or a decoder that is given `states`); None without.

    Raises `UnsupportedModelError` where something is added to scores that is not the same embedding of distances in
    every attention to the stack's own tokens, and nothing in those to states.
    """
    few = _run(stack, _FEW, states, only_first=False)
    if all(summand is None or not bool(summand.any()) for summand in few.summands):
        return None
    refused = UnsupportedModelError(
        f"{family}: the attention of {type(stack).__name__} adds something to its scores that is not one embedding of "
        "the distance between two tokens; a model with it cannot be exported"
    )
    many = _run(stack, _LOOKED_AT, states, only_first=True)
    first = many.summands[0]
    made = [(m, ids) for m, ids, out in many.looked_up if first is not None and _is(out, first)]
    if not made:
        raise refused
    embedding, ids = made[0]
    line = torch.cat([ids[:, 0].flip(0), ids[0, 1:]])  # by distance, from the first key of the last query on
    middle, places = _LOOKED_AT - 1, torch.arange(_LOOKED_AT)
    far = _constant_from(line, middle)
    if far > _LOOKED_AT // 2 or not torch.equal(ids, line[places[None] - places[:, None] + middle]):
        raise refused
    found = RelativePositions(embedding, line[middle - far : middle + far + 1].clone())
    with torch.no_grad():
        wanted = found.bias(_FEW, _FEW)
    own = [s for s in few.summands if s is not None and s.shape[-1] == _FEW]
    rest = [s for s in few.summands if s is None or s.shape[-1] != _FEW]
    if any(not torch.equal(s, wanted) for s in own) or any(s is not None and bool(s.any()) for s in rest):
        raise refused
    return found


def _run(stack: Any, tokens: int, states: dict[str, Any] | None, *, only_first: bool) -> _Look:
    look = _Look(only_first=only_first)
    embeds = torch.zeros(1, tokens, stack.config.get_text_config().hidden_size, dtype=stack.dtype)
    handles = [m.register_forward_hook(look.keep) for m in stack.modules() if isinstance(m, nn.Embedding)]
    try:
        watched = attention_implementation(stack, "vlmexport_relative", look.attend)
        with contextlib.suppress(_SeenError), torch.no_grad(), watched:
            stack(inputs_embeds=embeds, use_cache=False, **(states or {}))
    finally:
        for handle in handles:
            handle.remove()
    return look


def _is(looked_up: torch.Tensor, summand: torch.Tensor) -> bool:
    """Is `summand` ``[1, heads, S, S]`` what an embedding gave, ``[S, S, heads]``?"""
    return looked_up.ndim == 3 and torch.equal(looked_up.permute(2, 0, 1)[None], summand)


def _constant_from(line: torch.Tensor, middle: int) -> int:
    """The smallest distance from `middle` behind which, on either side, all numbers of `line` are the same."""
    sides = line[: middle + 1].flip(0), line[middle:]
    return max(_last_other(side) + 1 for side in sides)


def _last_other(side: torch.Tensor) -> int:
    """The last place of a number that is not the last one; -1 where all are the same."""
    others = (side != side[-1]).nonzero()
    return int(others[-1]) if len(others) else -1
