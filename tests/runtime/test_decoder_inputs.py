"""What belongs to a token stays with it: cut, padded on either side, and continued by an answer."""

from __future__ import annotations

import numpy as np
import pytest

from vlmexport.errors import BadInputError
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.decoder_inputs import DecoderInputs, further_inputs, stacked
from vlmexport.runtime.protocol import ModelInputs, next_shift


def prompt(tokens: int, start: int = 0) -> DecoderInputs:
    """Everything says which token it belongs to."""
    numbers = np.arange(start, start + tokens)
    return DecoderInputs(
        np.tile(numbers[None, :, None], (1, 1, 2)).astype(np.float32),
        {
            "position_ids": np.tile(numbers, (3, 1, 1)),
            "deepstack_embeds": np.tile(numbers[None, None, :, None], (2, 1, 1, 2)).astype(np.float32),
            "block_ids": numbers[None],
        },
    )


def tokens_of(inputs: DecoderInputs, row: int = 0) -> list[list[int]]:
    extras = inputs.extras
    found = (extras["position_ids"][2, row], extras["deepstack_embeds"][1, row, :, 0], extras["block_ids"][row])
    return [inputs.embeds[row, :, 0].tolist(), *(array.tolist() for array in found)]


def test_a_part_of_a_prompt() -> None:
    assert tokens_of(prompt(5).tokens(1, 3)) == [[1, 2]] * 4
    assert tokens_of(prompt(5).tokens(3)) == [[3, 4]] * 4


@pytest.mark.parametrize(("side", "row", "mask"), [("right", [7, 8, 7], [1, 1, 0]), ("left", [8, 7, 8], [0, 1, 1])])
def test_padding_repeats_the_row(side: str, row: list[int], mask: list[int]) -> None:
    both, found = stacked([prompt(2, 7), prompt(3)], side)  # type: ignore[arg-type]
    assert tokens_of(both) == [row] * 4
    assert tokens_of(both, 1) == [[0, 1, 2]] * 4
    assert found.tolist() == [mask, [1, 1, 1]]


def test_an_answer_goes_on_behind_the_largest_position_and_has_nothing_added() -> None:
    given = prompt(3, 4)
    longer = given.followed(np.full((1, 2, 2), 9.0, np.float32))
    assert tokens_of(longer) == [[4, 5, 6, 9, 9], [4, 5, 6, 7, 8], [4, 5, 6, 0, 0], [4, 5, 6, 0, 0]]


def test_what_is_no_number_of_a_token_is_mapped() -> None:
    doubled = prompt(2, 3).mapped(lambda array: array * 2)
    assert tokens_of(doubled) == [[6, 8], [3, 4], [6, 8], [3, 4]]


def test_the_next_position_follows_the_largest_valid_one() -> None:
    positions = np.array([[[0, 1, 1, 2], [0, 1, 50, 50]]] * 3)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert next_shift(positions, mask, mask.sum(axis=1)).tolist() == [-1, 0]


def test_an_unknown_further_input_is_refused() -> None:
    spec = MergeSpec(1, extras=("other_inputs",))
    ids = np.zeros((1, 2), np.int64)
    with pytest.raises(BadInputError, match="the decoder needs other_inputs, which this version cannot make"):
        further_inputs(spec, [ModelInputs(ids)], np.zeros((1, 2, 2)), ids, None)
