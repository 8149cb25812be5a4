"""Calls of an engine that takes so many tokens and gives so many logits: together they answer what was asked."""

import numpy as np
import pytest

from vlmexport.errors import BadInputError
from vlmexport.runtime.static_cache import pieces, positions_to_keep, require_room


def test_all_positions_or_the_last_valid_ones_of_each_row():
    valid = np.array([5, 1])
    assert positions_to_keep(valid, 5, 0).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert positions_to_keep(valid, 5, 1).tolist() == [[4], [0]]
    assert positions_to_keep(valid, 5, 3).tolist() == [[2, 3, 4], [0, 0, 0]]
    assert positions_to_keep(np.array([2]), 2, 9).tolist() == [[0, 1]]


def test_a_full_cache_is_named_with_what_would_not_fit():
    require_room(np.array([3, 7]), 1, 8)
    with pytest.raises(BadInputError, match="1 tokens behind 8 of them do not fit the static cache of 8"):
        require_room(np.array([3, 8]), 1, 8)
    with pytest.raises(BadInputError, match="9 tokens do not fit the static cache of 8; export with a larger"):
        require_room(np.zeros(1, np.int64), 9, 8)


@pytest.mark.parametrize("keep", [0, 1, 3, 11, 40])
@pytest.mark.parametrize("longest", [1, 7, 100])
def test_the_pieces_answer_every_position_once_within_their_limits(keep, longest):
    tokens, most = 23, 4
    wanted = positions_to_keep(np.array([23, 2, 9]), tokens, keep)
    out = np.full((*wanted.shape, 1), -1)
    edges = []
    for piece in pieces(wanted, tokens, longest, most):
        edges.append((piece.start, piece.stop))
        assert 0 < piece.stop - piece.start <= longest
        assert 1 <= piece.positions.shape[1] <= most
        assert (piece.positions < piece.stop - piece.start).all()
        assert (out[piece.filled] == -1).all()
        piece.store((piece.positions + piece.start)[:, :, None], out)
    assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
    assert edges[-1][1] == tokens
    assert (out[:, :, 0] == wanted).all()


def test_few_logits_do_not_shorten_the_calls():
    wanted = positions_to_keep(np.array([20, 3]), 20, 1)
    assert [(p.start, p.stop) for p in pieces(wanted, 20, 100, 8)] == [(0, 20)]
    assert [p.stop for p in pieces(positions_to_keep(np.array([20]), 20, 0), 20, 100, 8)] == [8, 16, 20]
