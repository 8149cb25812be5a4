"""The bookkeeping of a decoder with a static KV cache (``attention: static`` in docs/manifest.md), as pure functions.

Such a graph takes ``write_indices``, the tokens that each row's cache holds, and ``logits_positions``, the new
positions that get logits. An engine takes only so many tokens, and gives only so many logits, at once: `pieces` cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.runtime.protocol import Array

Ids: TypeAlias = NDArray[np.int64]


def require_room(lengths: Ids, tokens: int, capacity: int) -> None:
    """Raise `BadInputError` when a cache of `capacity` slots cannot take `tokens` more behind any of `lengths`."""
    held = int(lengths.max(initial=0))
    if held + tokens > capacity:
        behind = f" behind {held} of them" if held else ""
        raise BadInputError(
            f"{tokens} tokens{behind} do not fit the static cache of {capacity}; export with a larger --max-seq"
        )


def positions_to_keep(valid: Ids, tokens: int, keep: int) -> Ids:
    """Which of `tokens` new positions get logits: int64 ``[batch, kept]``.

    `valid` ``[batch]`` are the new tokens of each row that are not padding. `keep` 0: all positions; n: the last n
    valid ones of each row, where a row with fewer repeats its first.
    """
    if not keep:
        return np.tile(np.arange(tokens, dtype=np.int64), (len(valid), 1))
    last: Ids = valid[:, None] - np.arange(min(keep, tokens), 0, -1)
    return np.maximum(last, 0)


@dataclass(frozen=True)
class Piece:
    """New tokens `start` to `stop` of every row, run in one call.

    `positions` int64 ``[batch, kept]``: ``logits_positions`` of the call (counted from `start`; at least one a row, and
    0 where a row needs fewer). `filled` bool ``[batch, wanted]``: which of the wanted positions the call answers, and
    `taken` int64 ``[filled.sum()]`` the column of its logits that each of them is.
    """

    start: int
    stop: int
    positions: Ids
    filled: NDArray[np.bool_]
    taken: Ids

    def store(self, logits: Array, out: Array) -> None:
        """Put the call's ``[batch, kept, vocab]`` where they belong in `out` ``[batch, wanted, vocab]``."""
        out[self.filled] = logits[np.nonzero(self.filled)[0], self.taken]


def pieces(wanted: Ids, tokens: int, longest: int, most: int) -> Iterator[Piece]:
    """Calls of at most `longest` tokens, and `most` logits a row, that together answer `wanted` ``[batch, wanted]``.

    As long as they can be: only where logits are wanted densely does their number shorten a call.
    """
    distinct = [np.unique(row) for row in wanted]
    start = 0
    while start < tokens:
        ahead = [row[row >= start] for row in distinct]
        stop = min([start + longest, tokens, *(int(row[most]) for row in ahead if len(row) > most)])
        yield _piece(start, stop, wanted, [row[row < stop] - start for row in ahead])
        start = stop


def _piece(start: int, stop: int, wanted: Ids, kept: list[Ids]) -> Piece:
    width = max(1, *(len(row) for row in kept))
    positions = np.zeros((len(kept), width), np.int64)
    for row, values in enumerate(kept):
        positions[row, : len(values)] = values
    filled = (wanted >= start) & (wanted < stop)
    taken = [np.searchsorted(kept[row], wanted[row, filled[row]] - start) for row in range(len(kept))]
    return Piece(start, stop, positions, filled, np.concatenate(taken).astype(np.int64))
