"""What stands for the sizes of one picture, and the vision sides that are exported with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.survey_a import ENTRIES
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.split import sizes
from vlmexport.split.capture import split_model
from vlmexport.split.packed import _Packed
from vlmexport.split.sizes import Sizes, _nearest_position_ids, _window_index

GRID = [[1, 4, 6]]
# Towers that split lengths, iterate grids, cut windows in another order, or loop in their projector.
READERS = ("minicpmv4_6", "paddleocr_vl", "video_llama_3", "cosmos3_edge")


def test_numbers_are_computed_as_a_tensor_computes() -> None:
    ours, theirs = Sizes(GRID), torch.tensor(GRID)
    pairs: list[tuple[Any, Any]] = [
        (ours.prod(dim=1), theirs.prod(dim=1)),
        (ours[:, 1:] // 2, theirs[:, 1:] // 2),
        (ours[:, 0] * ours[:, 1] - 1, theirs[:, 0] * theirs[:, 1] - 1),
        (ours[:, 1] + ours[:, 2] ** 2, theirs[:, 1] + theirs[:, 2] ** 2),
        (torch.cumsum(ours[0], dim=0, dtype=torch.int32), torch.cumsum(theirs[0], dim=0)),  # type: ignore[call-overload]
        (nn.functional.pad(ours[:, 1:], (1, 0), value=1), nn.functional.pad(theirs[:, 1:], (1, 0), value=1)),  # type: ignore[arg-type]
        (ours.to("cpu"), theirs),
    ]
    for one, other in pairs:
        assert one.tolist() == other.tolist()
        assert one.shape == other.shape
        assert torch.equal(one.tensor(), other)
    assert [tuple(row) for row in ours] == [(1, 4, 6)]
    assert len(ours) == 1


def test_what_no_trace_can_follow_is_refused() -> None:
    for use in (lambda s: s.max(), lambda s: torch.repeat_interleave(s, 2)):
        with pytest.raises(UnsupportedModelError, match="sizes of its pictures in a way that cannot be traced"):
            use(Sizes(GRID))


@pytest.mark.parametrize("size", [(4, 6), (2, 2), (8, 4)])
def test_the_order_of_windows_is_that_of_transformers(size: tuple[int, int]) -> None:
    from transformers.vision_utils import get_vision_window_index

    settings = {"spatial_merge_size": 1, "window_size": 2, "patch_size": 1}
    wanted, ends = get_vision_window_index(torch.tensor([[1, *size]]), **settings)
    packed = _Packed()
    order, windows = _window_index(packed.get_vision_window_index)(Sizes([[1, *size]]), **settings)
    assert torch.equal(order, wanted)
    assert windows.numel() == ends.numel()
    assert windows.tolist() == [size[0] * size[1]]
    assert packed.current is windows
    hidden = windows.hidden(torch.zeros(1))
    assert packed.current is None
    assert torch.equal(hidden[0, 0] == 0, torch.block_diag(*[torch.ones(4, 4)] * (ends.numel() - 1)).bool())


def test_a_patch_has_the_row_of_the_table_that_transformers_gives_it() -> None:
    from transformers.vision_utils import get_vision_nearest_position_ids as theirs

    ours = _nearest_position_ids(theirs)
    for rows in range(1, 20):
        for side in (4, 7, 70):
            size = [rows, 23 - rows]
            assert torch.equal(ours(Sizes([size]), side), theirs(torch.tensor([size]), side))


@pytest.mark.slow
@pytest.mark.parametrize("family", READERS)
def test_vision_sides_that_read_sizes_are_cut_for_one_picture(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(str(ENTRIES[family].make(tmp_path)))
    split = split_model(vlm, ENTRIES[family].examples(vlm))
    assert split.merge.pictures is not None
    assert split.merge.pictures.fixed == ((("image_merge_sizes", 2),) if family == "video_llama_3" else ())


@pytest.mark.slow
def test_windows_in_the_order_of_patches_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sizes._OWN["get_vision_window_index"]

    def as_they_lie(held: Any) -> Any:
        def run(grid: Any, **settings: Any) -> Any:
            order, windows = own(held)(grid, **settings)
            return torch.arange(len(order)), windows

        return run

    monkeypatch.setitem(sizes._OWN, "get_vision_window_index", as_they_lie)
    vlm = load_vlm(str(ENTRIES["minicpmv4_6"].make(tmp_path)))
    with pytest.raises(UnsupportedModelError, match="minicpmv4_6: the replayed projector differ"):
        split_model(vlm, ENTRIES["minicpmv4_6"].examples(vlm))
