"""Inputs that every decoder layer gets of its own, in a trace of one layer of each kind.

transformers' decoders make them for all layers at once (``project_per_layer_inputs``, ``[B, S, layers, width]``) and
hand each layer its slice as ``per_layer_input``. A trace of some layers would count those; the neutral operator
``LayerRows`` stands for the slice of whichever layer it is repeated for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import nn

from vlmexport.lower.onnx import neutral
from vlmexport.split.per_layer import PER_LAYER_ARGUMENT, PER_LAYER_MAKER, per_layer_shape


@dataclass
class LayerRows:
    """What the layers of the running trace get: ``[B, S, layers, width]``; None where they get nothing."""

    made: torch.Tensor | None = None

    def given(self, layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``(args, kwargs)`` of a call of `layer` behind its bracketed `hidden`, with the operator in the place."""
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        if self.made is None or PER_LAYER_ARGUMENT not in names:
            return args, kwargs
        rows, place = neutral.layer_rows(self.made, hidden), names.index(PER_LAYER_ARGUMENT) - 1
        if place < len(args):
            return (*args[:place], rows, *args[place + 1 :]), kwargs
        return args, {**kwargs, PER_LAYER_ARGUMENT: rows}


@contextmanager
def layer_rows_kept(decoder: Any) -> Iterator[LayerRows]:
    """Within, what `decoder` makes for its layers is kept, for all of them whatever it counts just now."""
    rows, shape = LayerRows(), per_layer_shape(decoder)
    if shape is None:
        yield rows
        return
    make: Callable[..., torch.Tensor] = getattr(decoder, PER_LAYER_MAKER)
    text = decoder.config.get_text_config()

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        count, text.num_hidden_layers = text.num_hidden_layers, shape[0]
        try:
            rows.made = make(*args, **kwargs)
        finally:
            text.num_hidden_layers = count
        return rows.made

    decoder.__dict__[PER_LAYER_MAKER] = made
    try:
        yield rows
    finally:
        del decoder.__dict__[PER_LAYER_MAKER]


def emit_layer_rows(tape: Tape, rows: ir.Value, layer: int) -> ir.Value:
    """The slice ``[B, S, width]`` of `rows` ``[B, S, layers, width]`` for `layer`."""
    index = tape.initializer(ir.tensor(layer, dtype=ir.DataType.INT64, name=f"layers.{layer}.rows.index"))
    return tape.op("Gather", [rows, index], {"axis": 2})
