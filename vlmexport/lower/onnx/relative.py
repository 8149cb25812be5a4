"""Learned relative positions in graphs: rows of an embedding by the distance of query and key, added to scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.split.relative import RelativePositions

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class RelativeLookup:
    """`RelativePositions` of a decoder: the embedding's `weight` ``[rows, heads]`` by its whole-model name."""

    weight: str
    buckets: torch.Tensor


@dataclass(frozen=True)
class AddedLookup:
    """A `RelativeLookup` in a graph under construction: its embedding is the value `rows`."""

    lookup: RelativeLookup
    rows: ir.Value

    def emit(self, tape: Tape, distances: ir.Value) -> ir.Value:
        """What scores get, ``[B, heads, S, T]`` of the type of `rows`; `distances` int64 ``[B, S, T]``."""
        far = len(self.lookup.buckets) // 2
        first, last, middle = (
            tape.initializer(ir.tensor(n, dtype=_INT64, name=f"relative.{name}"))
            for name, n in (("first", -far), ("last", far), ("middle", far))
        )
        buckets = tape.initializer(ir.tensor(self.lookup.buckets.numpy(), name="relative.buckets"))
        places = tape.op("Add", [tape.op("Clip", [distances, first, last]), middle])
        found = tape.op("Gather", [self.rows, tape.op("Gather", [buckets, places])])
        summand = tape.op("Transpose", [found], {"perm": [0, 3, 1, 2]})
        summand.type = ir.TensorType(self.rows.dtype or ir.DataType.FLOAT)
        return summand


def relative_lookup(names: Mapping[int, str], relative: RelativePositions | None) -> RelativeLookup | None:
    """`relative` by name; `names` are the paths of the model's modules, by identity."""
    return None if relative is None else RelativeLookup(f"{names[id(relative.embedding)]}.weight", relative.buckets)


class AddedScores:
    """What an encoder's attention adds to its scores in one trace: made once, whatever the number of layers."""

    def __init__(self, relative: RelativePositions) -> None:
        self.relative = relative
        self._made: dict[int, tuple[Any, torch.Tensor]] = {}

    def with_mask(self, mask: torch.Tensor | None, queries: Any, keys: Any) -> torch.Tensor:
        """The summand ``[1, heads, queries, keys]`` and the additive `mask` ``[B, 1, queries, keys]`` in one."""
        if id(mask) not in self._made:
            summand = self.relative.bias(queries, keys)
            self._made[id(mask)] = mask, summand if mask is None else summand + mask
        return self._made[id(mask)][1]
