"""`DecoderWeights`: where every emitter gets its codes and floats from, whoever made them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmexport.quantize.fold import Fold
from vlmexport.quantize.kv_cache import CachePeaks
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

_PACKED_AXES = 3


@dataclass(frozen=True)
class DecoderWeights:
    """The decoder's weights by whole-model name, as they are to be stored.

    Experts packed in one parameter ``[E, N, K]`` are matrices of their own, named ``<parameter>.<expert>``; the
    parameter has one scheme and one fold. Those of `transposed` are stored ``[E, K, N]`` and have no folds; their
    matrices are ``[N, K]`` all the same.

    `tensors` are the checkpoint's; `folds` say which of them change because scales were moved; `schemes` how the
    quantized ones become codes; `given` holds codes that exist already (from the layer loop, read from disk when asked
    for, or kept from a quantized checkpoint). What is not given is quantized from the weight alone, when asked for.
    `cache_peaks` (None: the cache is not quantized) are of the unfolded model.
    """

    tensors: Mapping[str, torch.Tensor]
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)
    given: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    folds: Mapping[str, Fold] = field(default_factory=dict)
    cache_peaks: CachePeaks | None = None
    transposed: frozenset[str] = frozenset()

    def matrices(self, name: str) -> list[str]:
        """What a weight with a scheme consists of: itself, or all of its experts."""
        weight = self.tensors[name]
        return [name] if weight.ndim < _PACKED_AXES else [f"{name}.{expert}" for expert in range(weight.shape[0])]

    def tensor(self, name: str) -> torch.Tensor:
        """The float weight: the checkpoint's own, or float32 with its fold applied. KeyError for an unknown name."""
        if name not in self.tensors:
            return self._expert(name)
        weight = self.tensors[name]
        return self.folds[name].apply(weight) if name in self.folds else weight

    def quantized(self, name: str) -> QuantizedTensor:
        """The codes of a matrix that has a scheme; raises `BadInputError` for NaN and for widths that do not divide.

        KeyError for a packed parameter as a whole: its experts have codes each.
        """
        if name in self.given:
            return self.given[name]
        whole = name in self.tensors and self.tensors[name].ndim < _PACKED_AXES
        scheme = self.schemes[name if whole else self._parameter(name)[0]]
        return quantize_data_free(self.tensor(name), scheme, name)

    def folded(self) -> dict[str, torch.Tensor]:
        """The floats that differ from the checkpoint: folded weights that are not quantized, float32."""
        return {name: self.tensor(name) for name in self.folds if name not in self.schemes}

    def _expert(self, name: str) -> torch.Tensor:
        """One expert ``[N, K]``, its share of the parameter's fold applied; the others are not touched."""
        parameter, expert = self._parameter(name)
        weight = self.tensors[parameter][expert]
        if parameter in self.transposed:
            return weight.t()
        return self.folds[parameter].of_expert(expert).apply(weight) if parameter in self.folds else weight

    def _parameter(self, name: str) -> tuple[str, int]:
        """The packed parameter and the number in an expert's name; KeyError when there is none."""
        parameter, _, number = name.rpartition(".")
        weight = self.tensors.get(parameter)
        if weight is None or weight.ndim != _PACKED_AXES or not number.isdecimal() or int(number) >= weight.shape[0]:
            raise KeyError(name)
        return parameter, int(number)


def quantize_data_free(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """Quantize ``weight [N, K]`` by an algorithm that needs no activations.

    Raises `BadInputError` as the algorithm does, ValueError for one that needs activations.
    """
    method = algorithm(scheme.algorithm)
    if method.calibrated or method.imported:
        origin = "the quantized checkpoint" if method.imported else "calibration"
        raise ValueError(f"{name}: codes of {scheme.algorithm} come from {origin}, and none were given")
    module, _, function = method.function.partition(":")
    quantize: Any = getattr(importlib.import_module(f"vlmexport.quantize.{module}"), function)
    made: QuantizedTensor = quantize(weight, scheme, name)
    return made
