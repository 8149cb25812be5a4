"""Block ids follow from a prompt's ids."""

from __future__ import annotations

import numpy as np
import pytest

from vlmexport.model.blocks import MaskKind, block_ids

IMAGE = 9
IDS = np.array([[9, 9, 1, 9, 2, 3], [1, 9, 9, 9, 9, 0]])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("causal", [[0] * 6, [0] * 6]),
        ("prefix", [[1] * 6, [1] * 6]),
        ("image_blocks", [[1, 1, 0, 2, 0, 0], [0, 1, 1, 1, 1, 0]]),
    ],
)
def test_blocks_follow_from_the_ids(kind: MaskKind, wanted: list[list[int]]) -> None:
    found = block_ids(kind, IDS, IMAGE)
    assert found.dtype == np.int64
    assert found.tolist() == wanted
