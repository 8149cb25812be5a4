"""Features that a decoder attends to and the mask of who sees them come together, in every runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlmexport.errors import BadInputError
from vlmexport.model.cross import HIDDEN, MISSING, SEEN, STATES, TILE_MASK
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.cross import CrossDecoder
from vlmexport.runtime.protocol import Cache
from vlmexport.runtime.torch import TorchRunner

EMBEDS, MASK = np.zeros((1, 4, 8), np.float32), np.ones((1, 4), np.int64)
STATE = np.ones((1, 6, 8), np.float32)


def tiles(value: int) -> Any:
    return np.full((1, 4, 2), value, np.int64)


class Told:
    """A decoder and an encoder that note what they are given."""

    outputs = ("key",)
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(shape=["batch_size", "cross_length", 8])])

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.input_types = {"key": np.float32}

    def run(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        self.given |= inputs
        return (np.zeros((1, 1, 1, 1)),)

    def prefill(self, _embeds: Any, _mask: Any, _keep: int, _reserve: int, extras: Any, _keys: Any) -> Any:
        self.given |= extras
        return np.zeros((1, 1, 3)), Cache(np.array([4]))


def crossing() -> tuple[Any, Told]:
    told = Told()
    spec = MergeSpec(1, place="cross_attention", extras=(TILE_MASK,), cross_layers=(0,), tile_tokens=3)
    return CrossDecoder(told, told, spec, lambda ids: ids), told  # type: ignore[arg-type]


ALONE = [
    pytest.param({STATES: STATE}, f"{STATES} came without {TILE_MASK}", id="features"),
    pytest.param({TILE_MASK: tiles(SEEN)}, f"{TILE_MASK} has 2 tiles and {STATES} is not there", id="seen"),
    pytest.param({TILE_MASK: tiles(HIDDEN)}, f"{TILE_MASK} has 2 tiles and {STATES} is not there", id="hidden"),
]


@pytest.mark.parametrize(("extras", "problem"), ALONE)
def test_one_without_the_other_is_refused(extras: dict[str, Any], problem: str) -> None:
    runner, told = crossing()
    with pytest.raises(BadInputError, match=problem):
        runner.prefill(EMBEDS, MASK, 1, 8, extras)
    assert not told.given
    with pytest.raises(BadInputError, match=problem):
        TorchRunner.prefill(SimpleNamespace(), EMBEDS, MASK, extras=extras)  # type: ignore[arg-type]


def test_both_reach_the_graphs() -> None:
    runner, told = crossing()
    runner.prefill(EMBEDS, MASK, 1, 8, {STATES: STATE, TILE_MASK: tiles(SEEN)})
    assert np.array_equal(told.given[STATES], STATE)
    assert np.array_equal(told.given[TILE_MASK], tiles(SEEN))


@pytest.mark.parametrize("extras", [{}, {TILE_MASK: np.full((1, 4, 1), MISSING, np.int64)}])
def test_without_pictures_no_tile_is_there(extras: dict[str, Any]) -> None:
    runner, told = crossing()
    runner.prefill(EMBEDS, MASK, 1, 8, extras)
    assert told.given[STATES].shape == (1, 3, 8)
    assert (told.given[TILE_MASK] == MISSING).all()
