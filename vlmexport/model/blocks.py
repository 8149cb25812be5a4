"""Blocks of prompt tokens that see each other, counted from the ids alone, for decoders that are not plainly causal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

MaskKind: TypeAlias = Literal["causal", "image_blocks", "prefix", "image_tokens"]


def block_ids(
    mask: MaskKind, input_ids: NDArray[np.int64], image_token_id: int, block_tokens: Sequence[int] = ()
) -> NDArray[np.int64]:
    """The decoder's ``block_ids`` int64 ``[batch, tokens]`` of whole prompts ``[batch, tokens]``.

    0: the token sees what came before it. Tokens with the same number above 0 see each other, too: the runs of image
    tokens, each by itself (``image_blocks``), the whole prompt (``prefix``), or all tokens with one of the ids
    `block_tokens`, wherever they stand (``image_tokens``).
    """
    if mask == "causal":
        return np.zeros_like(input_ids)
    if mask == "prefix":
        return np.ones_like(input_ids)
    if mask == "image_tokens":
        return np.isin(input_ids, block_tokens).astype(np.int64)
    image = input_ids == image_token_id
    before = np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    runs: NDArray[np.int64] = np.where(image, np.cumsum(image & ~before, axis=1), 0).astype(np.int64)
    return runs
