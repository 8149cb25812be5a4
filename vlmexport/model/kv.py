"""Geometry and memory of what a decoder keeps from token to token: keys and values, and states of fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer: two tensors ``[batch, heads, length, head_dim]``."""

    heads: int
    head_dim: int


@dataclass(frozen=True)
class State:
    """A state of fixed size that layer `layer` keeps: ``[batch, *shape]``, zeros before the first token.

    `kind` ``conv``: the last inputs of a causal convolution; ``recurrent``: the matrix of linear attention. `dtype` is
    its numpy type; "" for the type that keys and values have when they are not quantized.
    """

    layer: int
    kind: str
    shape: tuple[int, ...]
    dtype: str = ""

    @property
    def past(self) -> str:
        """The decoder graph's input."""
        return f"past_{self.kind}.{self.layer}"

    @property
    def present(self) -> str:
        """The decoder graph's output."""
        return f"present_{self.kind}.{self.layer}"

    def to_dict(self) -> dict[str, Any]:
        """JSON data; ``dtype`` only where there is one."""
        body = {"layer": self.layer, "kind": self.kind, "shape": list(self.shape)}
        return {**body, "dtype": self.dtype} if self.dtype else body


@dataclass(frozen=True)
class KVGeometry:
    """Shape of the cache: `layers` decoder layers, each with keys and values of `heads` x `head_dim`.

    `per_layer`, where it is not empty, has one entry for each layer instead: None for one that keeps no keys and values
    of its own (a convolution, linear attention, a layer that reads another's). `states`: what else layers keep.
    """

    layers: int
    heads: int
    head_dim: int
    per_layer: tuple[LayerKV | None, ...] = ()
    states: tuple[State, ...] = ()

    @property
    def uniform(self) -> bool:
        """Does every layer keep keys and values of one shape, and nothing else?"""
        return not self.per_layer and not self.states

    def layer(self, index: int) -> LayerKV | None:
        """What layer `index` keeps."""
        return self.per_layer[index] if self.per_layer else LayerKV(self.heads, self.head_dim)

    def states_of(self, index: int) -> tuple[State, ...]:
        """The states of layer `index`."""
        return tuple(state for state in self.states if state.layer == index)

    @property
    def keeping(self) -> dict[int, LayerKV]:
        """The layers that keep keys and values, in order."""
        found = {index: self.layer(index) for index in range(self.layers)}
        return {index: kept for index, kept in found.items() if kept is not None}

    def pasts(self) -> dict[str, LayerKV]:
        """The graph inputs of keys and values, in order; `present_name` gives the outputs."""
        return {f"past_key_values.{i}.{kind}": kept for i, kept in self.keeping.items() for kind in ("key", "value")}

    def bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Cache bytes for one token of one sequence: the values of all keys and values times `bytes_per_value`."""
        return 2 * sum(kept.heads * kept.head_dim for kept in self.keeping.values()) * bytes_per_value

    def state_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of the states of one sequence, however long it is; `bytes_per_value` for those without a type."""
        sizes = {"": bytes_per_value, "float16": 2, "float32": 4}
        return sum(math.prod(state.shape) * sizes[state.dtype] for state in self.states)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, as manifests have it under ``model.kv``."""
        body: dict[str, Any] = {"layers": self.layers, "heads": self.heads, "head_dim": self.head_dim}
        if self.per_layer:
            body["per_layer"] = [None if kept is None else [kept.heads, kept.head_dim] for kept in self.per_layer]
        if self.states:
            body["states"] = [state.to_dict() for state in self.states]
        return body

    @staticmethod
    def from_dict(data: dict[str, Any]) -> KVGeometry:
        """Read `to_dict`'s data back; other keys are left alone."""
        per_layer = tuple(None if kept is None else LayerKV(*kept) for kept in data.get("per_layer", ()))
        states = tuple(
            State(s["layer"], s["kind"], tuple(s["shape"]), s.get("dtype", "")) for s in data.get("states", ())
        )
        return KVGeometry(data["layers"], data["heads"], data["head_dim"], per_layer, states)


def present_name(past: str) -> str:
    """The graph output that follows the graph input `past`."""
    return past.replace("past_key_values.", "present.", 1)
