"""States of fixed size that a decoder graph takes and gives, in two buffers each: one is read, the other written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike

from vlmexport.model.kv import State
from vlmexport.runtime.protocol import Array


class StateBuffers:
    """The states of one running batch where the cache lives (`device`: onnxruntime's name), zeros at first.

    `types` are those of the graph's inputs by name.
    """

    def __init__(self, states: tuple[State, ...], batch: int, types: Mapping[str, DTypeLike], device: str) -> None:
        self.states = states
        made = [empty_states(states, batch, types) for _ in range(2)]
        self._read, self._written = (
            {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in arrays.items()}
            for arrays in made
        )

    def bind(self, binding: Any) -> None:
        """Bind the states of the next run to an onnxruntime ``IOBinding``."""
        for state in self.states:
            binding.bind_ortvalue_input(state.past, self._read[state.past])
            binding.bind_ortvalue_output(state.present, self._written[state.past])

    def advance(self) -> None:
        """What the last run wrote is what the next one reads."""
        self._read, self._written = self._written, self._read

    def held(self, past: str) -> Array:
        """The state that the graph input `past` would get next (a copy): ``[batch, *shape]``."""
        array: Array = self._read[past].numpy()
        return array.copy()


def empty_states(states: tuple[State, ...], batch: int, types: Mapping[str, DTypeLike]) -> dict[str, Array]:
    """Zeros ``[batch, *shape]`` by graph input."""
    return {state.past: np.zeros((batch, *state.shape), types[state.past]) for state in states}
