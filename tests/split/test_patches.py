"""Resizing with antialiasing as matrix products, and what stands for one picture's grid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.patches import _Everything, _Grid, resized_by_matrices


@pytest.mark.parametrize("size", [(4, 4), (3, 40), (31, 7), (2, 6), (64, 5), (1, 1)])
@pytest.mark.parametrize("side", [4, 7, 16])
def test_matrices_resize_as_pytorch_does(side: int, size: tuple[int, int]) -> None:
    x = torch.randn(1, 5, side, side, generator=torch.Generator().manual_seed(0))
    settings = {"mode": "bilinear", "align_corners": False, "antialias": True}
    wanted = nn.functional.interpolate(x, size=size, **settings)  # type: ignore[arg-type]
    own = nn.functional.interpolate
    with resized_by_matrices():
        found = nn.functional.interpolate(x, size=size, **settings)  # type: ignore[arg-type]
        plain = nn.functional.interpolate(x, size=size, mode="nearest")
    assert nn.functional.interpolate is own
    assert (found - wanted).abs().max() <= 1e-6
    assert torch.equal(plain, own(x, size=size, mode="nearest"))


def test_other_questions_about_the_grid_are_refused() -> None:
    assert _Grid(2, 3)[0].tolist() == [2, 3]
    assert _Everything(6).sum(dim=1) == (6,)
    for stand_in, name in ((_Grid(2, 3), "prod"), (_Everything(6), "bool")):
        with pytest.raises(UnsupportedModelError, match=rf"in a way that cannot be traced \({name}\)"):
            getattr(stand_in, name)
