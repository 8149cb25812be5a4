"""Batches for a reference whose layers keep states: row by row, each without its padding.

transformers puts padding of a prompt into the state that it keeps, unless the padding is on the left; a row alone has
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmexport.runtime.protocol import Array, Cache, Extras, Runner, token_axis


@dataclass
class RowCaches(Cache):
    """The caches of the rows of a batch, each of a batch of one."""

    rows: list[Cache]


def prefill_rows(
    runner: Runner, inputs_embeds: Array, attention_mask: NDArray[np.int64], keep: int, extras: Extras | None
) -> tuple[Array, RowCaches]:
    """`Runner.prefill` of a batch by `runner`, row by row; logits of padding are zeros."""
    width, made, caches = attention_mask.shape[1], [], []
    for row, valid in enumerate(attention_mask == 1):
        places = np.flatnonzero(valid)
        ones = np.ones((1, len(places)), np.int64)
        logits, cache = runner.prefill(
            inputs_embeds[row : row + 1, places], ones, keep, extras=_row(extras, row, places)
        )
        if keep:
            made.append(_repeated(logits, min(keep, width)))
        else:
            whole = np.zeros((1, width, logits.shape[2]), logits.dtype)
            whole[:, places] = logits
            made.append(whole)
        caches.append(cache)
    batch = RowCaches(np.zeros(len(caches), np.int64), caches)
    _advance(batch)
    return np.concatenate(made), batch


def decode_rows(runner: Runner, inputs_embeds: Array, cache: RowCaches, keep: int, extras: Extras | None) -> Array:
    """`Runner.decode` of a batch by `runner`, row by row."""
    tokens = np.arange(inputs_embeds.shape[1])
    rows = [
        runner.decode(inputs_embeds[row : row + 1], one, keep, extras=_row(extras, row, tokens))
        for row, one in enumerate(cache.rows)
    ]
    _advance(cache)
    return np.concatenate(rows)


def _row(extras: Extras | None, row: int, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Array]:
    """The further inputs of one row's tokens at `places`."""
    found = {}
    for name, array in (extras or {}).items():
        axis = token_axis(name, array)
        found[name] = array.take([row], axis=axis - 1).take(places, axis=axis)
    return found


def _repeated(logits: Array, count: int) -> Array:
    """The last `count` positions; the first of a row that has fewer stands for those that it lacks."""
    missing = max(count - logits.shape[1], 0)
    return np.concatenate([np.repeat(logits[:, :1], missing, axis=1), logits], axis=1)


def _advance(cache: RowCaches) -> None:
    cache.lengths = np.concatenate([row.lengths for row in cache.rows])
    cache.position_shift = np.concatenate([row.position_shift for row in cache.rows])
