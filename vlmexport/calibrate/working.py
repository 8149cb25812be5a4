"""`WorkingLayer`: one decoder layer in float32, with the folds that changed its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vlmexport.calibrate.replay import float32_parameters
from vlmexport.quantize.fold import Fold


class WorkingLayer:
    """A layer's float32 parameters by name inside the layer, each the checkpoint's own with its fold applied."""

    def __init__(self, layer: nn.Module, originals: Mapping[str, torch.Tensor]) -> None:
        self.layer = layer
        self.parameters: dict[str, nn.Parameter] = dict(layer.named_parameters())
        self._originals = originals
        self._folds: dict[str, Fold] = {}

    @property
    def folds(self) -> dict[str, Fold]:
        """The folds so far, by parameter name."""
        return dict(self._folds)

    def add(self, changes: Mapping[str, Fold]) -> None:
        """Fold on top of what is folded already."""
        self._write({n: self._folds[n].then(f) if n in self._folds else f for n, f in changes.items()})

    def reset(self, names: Mapping[str, Fold], folds: Mapping[str, Fold]) -> None:
        """Take `names` back to what `folds` says of them."""
        self._write({n: folds.get(n, Fold()) for n in names})

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Put `value` (of any float dtype) in place of the parameter `name`."""
        self.parameters[name].copy_(value)

    def _write(self, folds: Mapping[str, Fold]) -> None:
        for name, fold in folds.items():
            moved = fold.rows is not None or fold.columns is not None
            self.parameters[name].copy_(fold.apply(self._originals[name]) if moved else self._originals[name])
            if moved:
                self._folds[name] = fold
            else:
                self._folds.pop(name, None)


@contextmanager
def working(layer: nn.Module) -> Iterator[WorkingLayer]:
    """Within, `layer` runs in float32 and may be changed; afterwards its own parameters are back."""
    originals = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    with torch.no_grad(), float32_parameters(layer.modules()):
        yield WorkingLayer(layer, originals)
