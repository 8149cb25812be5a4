"""Every kind of transform: undone exactly, on ``meta`` tensors too, and rows only where it says so."""

from __future__ import annotations

import pytest
import torch

from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.values import apply, invert, moves_rows_only

# Kind, its arguments, a weight's shape, the shapes of what it becomes.
KINDS = [
    (None, (), (6, 4), [(6, 4)]),
    ("permute", (2,), (16, 4), [(16, 4)]),
    ("permute", (2,), (16,), [(16,)]),
    ("add_one", (), (6,), [(6,)]),
    ("roll_rows", (-1,), (1, 5, 4), [(1, 5, 4)]),
    ("split_rows", (3,), (12, 4), [(4, 4)] * 3),
    ("split_frames", (), (6, 3, 2, 4, 4), [(6, 3, 4, 4)] * 2),
    ("patch_kernel", (4, 3), (6, 48), [(6, 3, 4, 4)]),
    ("squeeze_channel", (), (6, 1, 3), [(6, 3)]),
    ("split_expert_rows", (), (2, 8, 4), [(2, 4, 4)] * 2),
]


def test_every_kind_is_tried_here() -> None:
    assert {kind for kind, *_ in KINDS} - {None} | {"row"} == set(values._KINDS)


@pytest.mark.parametrize(("kind", "arguments", "shape", "made"), KINDS)
def test_a_kind_is_undone(
    kind: str | None, arguments: tuple[int, ...], shape: tuple[int, ...], made: list[tuple[int, ...]]
) -> None:
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    tensors = apply(weight, kind, arguments)
    assert [tuple(tensor.shape) for tensor in tensors] == made
    assert torch.equal(invert(tensors, kind, arguments), weight)
    blank = apply(weight.to("meta"), kind, arguments)
    assert [tuple(tensor.shape) for tensor in blank] == made


ROW_KINDS = [(kind, arguments, shape) for kind, arguments, shape, _ in KINDS if moves_rows_only(kind) and shape[1:]]


@pytest.mark.parametrize(("kind", "arguments", "shape"), ROW_KINDS)
def test_rows_move_whole_where_a_kind_says_so(
    kind: str | None, arguments: tuple[int, ...], shape: tuple[int, int]
) -> None:
    weight = torch.arange(shape[0])[:, None].expand(shape)
    for tensor in apply(weight, kind, arguments):
        assert torch.equal(tensor, tensor[:, :1].expand(tensor.shape))


def test_permuting_puts_the_halves_of_a_head_side_by_side() -> None:
    (tensor,) = apply(torch.arange(8), "permute", (2,))
    assert tensor.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rolling_puts_the_first_row_last() -> None:
    (tensor,) = apply(torch.arange(3)[:, None], "roll_rows", (-1,))
    assert tensor.flatten().tolist() == [1, 2, 0]


def test_a_row_does_not_give_the_table_back() -> None:
    (row,) = apply(torch.arange(6).reshape(3, 2), "row", (1,))
    assert row.tolist() == [2, 3]
    with pytest.raises(ValueError, match="row 1 of a table"):
        invert([row], "row", (1,))


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        apply(torch.zeros(2, 2), "mirror")
