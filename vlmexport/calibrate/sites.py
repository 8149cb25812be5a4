"""What the matrices of a decoder layer read: observed while it runs, never guessed from names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from vlmexport.quantize.statistics import InputPower, InputStatistics
from vlmexport.split.layers import overridden
from vlmexport.split.matrices import PACKED_AXES, LinearObserver, Matrix, matrices_of


class _Sums(Protocol):
    """Sums over input rows."""

    def add(self, inputs: torch.Tensor) -> None: ...


_S = TypeVar("_S", bound=_Sums)


class Sites(Generic[_S]):
    """Sums over the inputs of a layer's matrices; those that read the same tensor share one.

    Rows of padding are left out wherever an input has one row for every position of the batch. `empty` makes the sums
    of no rows, for a number of input features and a device.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], empty: Callable[[int, torch.device], _S]) -> None:
        self._parameters = parameters
        self._empty = empty
        self._matrices = matrices_of(parameters.items())
        self._site: dict[str, _S] = {}
        self._seen: dict[tuple[int, int, int, int], _S] = {}
        self._alive: list[torch.Tensor] = []
        self._valid = torch.ones(0, dtype=torch.bool)

    @contextmanager
    def watching(self, layer: nn.Module, valid: torch.Tensor) -> Iterator[None]:
        """Within, one forward of `layer` on a batch with positions `valid` bool ``[B, S]`` is taken in."""
        self._seen.clear()
        self._valid = valid.flatten()
        with packed_experts_without_padding(layer, valid), LinearObserver(self._matrices, self._parameters, self._add):
            yield
        self._seen.clear()
        self._alive.clear()

    def of(self, matrix: Matrix) -> _S | None:
        """The statistics of what `matrix` read, None when it was never used."""
        return self._site.get(matrix.name)

    def seen(self) -> list[tuple[Matrix, _S]]:
        """The matrices that were used, in the order of the parameters, each with its statistics."""
        return [(matrix, self._site[matrix.name]) for matrix in self._matrices if matrix.name in self._site]

    def sites(self) -> list[tuple[_S, list[Matrix]]]:
        """Every statistics object with the matrices that share it, in the order of the parameters."""
        shared: dict[int, tuple[_S, list[Matrix]]] = {}
        for matrix, site in self.seen():
            shared.setdefault(id(site), (site, []))[1].append(matrix)
        return list(shared.values())

    def _add(self, matrix: Matrix, x: torch.Tensor) -> None:
        # Kept alive until the forward ends, so that one address means one tensor.
        self._alive.append(x)
        key = (x.data_ptr(), x._version, x.numel(), x.shape[-1])
        if key in self._seen and self._site.setdefault(matrix.name, self._seen[key]) is self._seen[key]:
            return
        if matrix.name not in self._site:
            self._site[matrix.name] = self._empty(x.shape[-1], x.device)
        self._seen[key] = self._site[matrix.name]
        rows = x.reshape(-1, x.shape[-1])
        padded = rows.shape[0] == self._valid.numel() and matrix.expert is None
        self._site[matrix.name].add(rows[self._valid] if padded else rows)


class SiteStatistics(Sites[InputStatistics]):
    """All that the calibrated algorithms need to know of the inputs."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(parameters, InputStatistics.empty)


class SitePowers(Sites[InputPower]):
    """The inputs' power alone."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(parameters, InputPower.empty)


@contextmanager
def packed_experts_without_padding(layer: nn.Module, valid: torch.Tensor) -> Iterator[None]:
    """Within, modules that own packed experts get the rows of `valid` positions only, and give zeros for the rest.

    Experts see rows gathered by the router, among which padding could no longer be told apart.
    """
    keep = valid.flatten()
    with ExitStack() as stack:
        if not keep.all():
            for module in layer.modules():
                if any(p.ndim == PACKED_AXES for p in module.parameters(recurse=False)):
                    stack.enter_context(overridden(module, _on_rows(module.forward, keep)))
        yield


def _on_rows(forward: Callable[..., Any], keep: torch.Tensor) -> Callable[..., Any]:
    def chosen(value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.shape[:1] == keep.shape
        return value[keep] if fits else value

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[:1] != keep.shape:
            return forward(hidden, *args, **kwargs)
        some = forward(hidden[keep], *map(chosen, args), **{k: chosen(v) for k, v in kwargs.items()})
        out = torch.zeros(hidden.shape[0], *some.shape[1:], dtype=some.dtype, device=some.device)
        out[keep] = some
        return out

    return run
