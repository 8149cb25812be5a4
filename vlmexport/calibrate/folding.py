"""Where scales can move between layers without changing the function: found by running a layer, proved by numbers.

A `FoldSite` is one vector of scales: the maker's rows are divided by it, the columns of all readers multiplied. Makers
are norms whose output rows reappear as the rows that linear layers read, and linear layers whose rows reach another
linear layer's input (up to down; values to output without grouped heads). Every site is tried with random powers of
two, which float32 multiplies exactly, and kept only when the layer's output stays: an overlooked reader shows there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmexport.calibrate.working import WorkingLayer
from vlmexport.quantize.fold import Fold
from vlmexport.split.matrices import LinearObserver, Matrix, matrices_of

FOLD_LIMIT = 1e-5
_PROBE_EXPONENTS = (-2, 3)
_NORM_OFFSETS = (0.0, 1.0)

_HIDDEN_READER = "something besides these linear layers depends on the norm's output"
_NO_MAKER = "no linear layer's rows reach its input one to one (grouped heads, or a nonlinearity between)"

Measure = Callable[[], float]


@dataclass(frozen=True)
class FoldSite:
    """Scales that may move from `maker`'s rows `start` to `stop` to the columns of `readers`.

    Names are parameters inside the layer; `vectors` are the maker's parameters that scale with its rows (weight and
    bias), `offset` is 1.0 for the weight of a norm that multiplies by ``1 + w``.
    """

    maker: str
    vectors: tuple[str, ...]
    start: int
    stop: int
    readers: tuple[str, ...]
    offset: float = 0.0

    @property
    def label(self) -> str:
        """``maker -> readers`` without ``.weight``, for reports."""
        return f"{_short(self.maker)} -> {', '.join(_short(r) for r in self.readers)}"

    def folds(self, scale: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> dict[str, Fold]:
        """The changes that move ``scale [K]`` (or ``[E, K]``, one row per expert)."""
        made: dict[str, Fold] = {}
        for name in self.vectors:
            axes = 2 if parameters[self.maker].ndim > 2 else 1
            size = parameters[name].shape[:axes]
            rows = torch.ones(size)
            rows[..., self.start : self.stop] = 1 / scale
            made[name] = Fold(rows=rows, offset=self.offset if name == self.maker else 0.0)
        for name in self.readers:
            made[name] = Fold(columns=scale)
        return made


@dataclass(frozen=True)
class FoldPlan:
    """The proven sites of a kind of layer, and why other inputs stay as they are (label to reason)."""

    sites: tuple[FoldSite, ...]
    refused: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {"sites": [dataclasses.asdict(site) for site in self.sites], "refused": dict(self.refused)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FoldPlan:
        """Read `to_dict`'s data back."""
        lists = ("vectors", "readers")
        sites = (FoldSite(**{**site, **{key: tuple(site[key]) for key in lists}}) for site in data["sites"])
        return FoldPlan(tuple(sites), data["refused"])


def find_folds(work: WorkingLayer, run: Callable[[], torch.Tensor], difference: Measure) -> FoldPlan:
    """Find and prove the sites of the layer in `work`.

    `run` runs the layer on a small batch; `difference` runs it and says how far its output is from the unchanged
    layer's, relative to the largest value.
    """
    seen = _observe(work, run)
    norms = _norm_candidates(work, seen)
    candidates = {forms[0].label: forms for forms in norms}
    behind_norms = {reader for forms in norms for reader in forms[0].readers}
    for reader in seen.order:
        if reader not in behind_norms:
            candidates[_short(reader)] = _linear_candidates(work, seen, reader)
    sites: list[FoldSite] = []
    refused: dict[str, str] = {}
    for label, forms in candidates.items():
        unseen = _unseen_reader(work, seen, forms[0]) if forms in norms else ""
        proven = None if unseen else next((s for s in forms if not _disproved(work, s, difference)), None)
        if proven is None:
            refused[label] = unseen or (_HIDDEN_READER if forms in norms else _NO_MAKER)
        else:
            sites.append(proven)
    return FoldPlan(tuple(sites), refused)


@dataclass
class _Seen:
    """One run of a layer: the parameters of linear products in order, their input rows, and the norms' output rows."""

    order: list[str]
    inputs: dict[str, set[bytes]]
    norms: dict[str, set[bytes]]


def _observe(work: WorkingLayer, run: Callable[[], torch.Tensor]) -> _Seen:
    seen = _Seen([], {}, {})

    def take(matrix: Matrix, x: torch.Tensor) -> None:
        if matrix.parameter not in seen.inputs:
            seen.order.append(matrix.parameter)
        seen.inputs.setdefault(matrix.parameter, set()).update(_rows(x))

    def keep(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, out: object) -> None:
            if isinstance(out, torch.Tensor):
                seen.norms.setdefault(path, set()).update(_rows(out))

        return hook

    norms = [(path, m) for path, m in work.layer.named_modules() if _multiplies_features(m)]
    handles = [module.register_forward_hook(keep(path)) for path, module in norms]
    try:
        with LinearObserver(matrices_of(work.parameters.items()), work.parameters, take):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows(x: torch.Tensor) -> Iterable[bytes]:
    rows = np.ascontiguousarray(x.detach().reshape(-1, x.shape[-1]).numpy())
    return (row.tobytes() for row in rows)


def _norm_candidates(work: WorkingLayer, seen: _Seen) -> list[tuple[FoldSite, ...]]:
    """Modules with a vector for a weight whose output rows are read by linear layers, multiplied by w or by 1 + w."""
    found = []
    for path, rows in seen.norms.items():
        module = work.layer.get_submodule(path)
        readers = tuple(name for name in seen.order if seen.inputs[name] <= rows)
        if readers:
            vectors = tuple(f"{path}.{local}" for local, _ in module.named_parameters(recurse=False))
            width = work.parameters[f"{path}.weight"].shape[0]
            found.append(
                tuple(FoldSite(f"{path}.weight", vectors, 0, width, readers, offset) for offset in _NORM_OFFSETS)
            )
    return found


def _multiplies_features(module: nn.Module) -> bool:
    """True for norms: a module with a vector as its weight, and a bias at most."""
    names = [name for name, _ in module.named_parameters()]
    return names in (["weight"], ["weight", "bias"]) and all(p.ndim == 1 for p in module.parameters())


def _unseen_reader(work: WorkingLayer, seen: _Seen, site: FoldSite) -> str:
    """A linear layer that did not run here may read the norm too, where no proof on this batch would show it."""
    for path, module in work.layer.named_modules():
        name = f"{path}.weight"
        if isinstance(module, nn.Linear) and name not in seen.inputs and module.in_features == site.stop:
            return f"{path} saw no token, so whether it reads this norm is not known"
    return ""


def _linear_candidates(work: WorkingLayer, seen: _Seen, reader: str) -> tuple[FoldSite, ...]:
    """Linear layers that run before `reader`, cut into slices of its width, the last slice first."""
    width, axes = work.parameters[reader].shape[-1], work.parameters[reader].ndim
    found = []
    for maker in reversed(seen.order[: seen.order.index(reader)]):
        weight = work.parameters[maker]
        experts_agree = weight.ndim == axes and weight.shape[:-2] == work.parameters[reader].shape[:-2]
        if not experts_agree or weight.shape[-2] % width:
            continue
        bias = f"{maker.removesuffix('weight')}bias" if maker.endswith(".weight") else f"{maker}_bias"
        vectors = (maker, bias) if bias in work.parameters else (maker,)
        starts = reversed(range(0, weight.shape[-2], width))
        found += [FoldSite(maker, vectors, start, start + width, (reader,)) for start in starts]
    return tuple(found)


def _disproved(work: WorkingLayer, site: FoldSite, difference: Measure) -> str:
    """Why moving random powers of two along `site` does not leave the layer's output alone ("" when it does)."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(*_PROBE_EXPONENTS, (site.stop - site.start,), generator=generator)
    before, changes = work.folds, site.folds(torch.exp2(exponents.float()), work.parameters)
    work.add(changes)
    moved = difference()
    work.reset(changes, before)
    return _verdict(moved)


def move_scales(work: WorkingLayer, site: FoldSite, scale: torch.Tensor, difference: Measure) -> str:
    """Fold ``scale [K]`` or ``[E, K]`` along `site`; returns "" when the layer's output stayed.

    Otherwise everything is taken back, and the text says how far the output moved.
    """
    before, changes = work.folds, site.folds(scale, work.parameters)
    work.add(changes)
    refusal = _verdict(difference())
    if refusal:
        work.reset(changes, before)
    return refusal


def _verdict(moved: float) -> str:
    return "" if moved <= FOLD_LIMIT else f"scaling it changes the layer's output by {moved:.1e}"


def _short(parameter: str) -> str:
    return parameter.removesuffix(".weight")
