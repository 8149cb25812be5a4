"""What each way of storing a weight does to the answers: measured under one scheme, scaled to the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vlmexport.calibrate.judge import Judge, exchanged
from vlmexport.calibrate.sites import SiteStatistics
from vlmexport.progress import Progress
from vlmexport.quantize.awq import output_error
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights, quantize_data_free
from vlmexport.split.names import module_path

# The mean square of each of a matrix's inputs ``[K]`` by the matrix's name; None where nothing was seen.
_Power = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True)
class UnitEffect:
    """Weights that read the same input, so that one choice for all of them keeps them in one product.

    `kl` in nats per token is what the codes at hand of all of them do alone; `ratios` the factor to it under each
    candidate, the first being the codes' own.
    """

    names: tuple[str, ...]
    kl: float
    ratios: tuple[float, ...]

    @property
    def name(self) -> str:
        """The unit's name: its first weight's."""
        return self.names[0]

    def under(self, candidate: int) -> float:
        """The estimated divergence alone under a candidate, nats per token."""
        return self.kl * self.ratios[candidate]


def unit_effects(
    judge: Judge,
    weights: DecoderWeights,
    candidates: Sequence[Mapping[str, QuantScheme]],
    names: Sequence[str],
    progress: Progress,
) -> list[UnitEffect]:
    """The effects of all units of `names`, in the order of the layers; `judge` must be ready.

    `candidates` are schemes by weight (a weight without one is not quantized), the first that of the codes. Divergence
    is quadratic in small errors, so that of another scheme is the measured one times the ratio of the squared output
    errors of the two, rounded to nearest (with the inputs taken for uncorrelated, as rounding errors are). Folds of
    `weights` are in place throughout: the codes were made for them, and they decide what rounding costs.
    """
    run = _Measurement(judge, weights, candidates, progress)
    with exchanged(judge.model, {name: weights.tensor(name) for name in weights.folds}):
        return run.every(names)


def stored(weights: DecoderWeights, name: str) -> torch.Tensor:
    """What the codes at hand of the weight `name` stand for: float32 of its shape, packed experts included."""
    parts = [weights.quantized(matrix).dequantize() for matrix in weights.matrices(name)]
    return parts[0] if weights.matrices(name) == [name] else torch.stack(parts)


def nearest(scheme: QuantScheme) -> QuantScheme:
    """`scheme`, or round-to-nearest of its bits and groups when it is calibrated."""
    calibrated = algorithm(scheme.algorithm).calibrated
    return dataclasses.replace(scheme, algorithm="rtn", clip=False) if calibrated else scheme


class _Measurement:
    """One walk through the layers."""

    def __init__(
        self,
        judge: Judge,
        weights: DecoderWeights,
        candidates: Sequence[Mapping[str, QuantScheme]],
        progress: Progress,
    ) -> None:
        self.judge, self.weights, self.candidates, self.progress = judge, weights, candidates, progress
        self.hidden: list[torch.Tensor | None] = judge.inputs()

    def every(self, names: Sequence[str]) -> list[UnitEffect]:
        judge, wanted = self.judge, set(names)
        head = f"{module_path(judge.model, judge.part.head)}.weight"
        known = {n for n in names if n == head or any(n.startswith(f"{path}.") for path in judge.paths)}
        effects = [self._unit((name,), 0, lambda _: None) for name in names if name not in known]
        with self.progress.stage("sensitivity", total=len(judge.paths)) as stage:
            for index in range(len(judge.paths)):
                stage.advance(0, f"layer {index}")
                effects += self._layer(index, wanted)
                stage.advance()
            if head in wanted:
                effects.append(self._unit((head,), len(judge.paths), self._head_power()))
        return effects

    def _layer(self, index: int, wanted: set[str]) -> list[UnitEffect]:
        layer, prefix = self.judge.replay.layers[index], f"{self.judge.paths[index]}."
        statistics = SiteStatistics(dict(layer.named_parameters()))
        after: list[torch.Tensor | None] = []
        for batch, hidden in zip(self.judge.batches, self.hidden, strict=True):
            with statistics.watching(layer, batch.valid):
                after.append(self.judge.replay.run(index, batch, hidden))
        powers = {prefix + m.name: seen.moment.diagonal() for seen, members in statistics.sites() for m in members}
        units = _units((prefix + m.parameter for m in members) for _, members in statistics.sites())
        unseen = [(prefix + n,) for n, _ in layer.named_parameters() if not any(prefix + n in unit for unit in units)]
        chosen = [tuple(n for n in unit if n in wanted) for unit in [*units, *unseen]]
        effects = [self._unit(unit, index, powers.get) for unit in chosen if unit]
        self.hidden = after
        return effects

    def _head_power(self) -> _Power:
        """The power of the LM head's inputs."""
        finals = self.judge.finals(self.hidden)
        power = torch.stack([final.square().sum(0) for final in finals]).sum(0)
        return lambda _: power

    def _unit(self, names: tuple[str, ...], first: int, power: _Power) -> UnitEffect:
        weights = self.weights
        found = self.judge.divergence({name: stored(weights, name) for name in names}, first, self.hidden)
        errors = [self._error(names, candidate, power) for candidate in self.candidates]
        return UnitEffect(names, found.kl, tuple(e / errors[0] if errors[0] > 0 else 0.0 for e in errors))

    def _error(self, names: tuple[str, ...], schemes: Mapping[str, QuantScheme], power: _Power) -> float:
        """Squared output error of all of `names` under a candidate."""
        there = [name for name in names if name in schemes]
        return sum(self._matrix_error(m, schemes[n], power(m)) for n in there for m in self.weights.matrices(n))

    def _matrix_error(self, matrix: str, scheme: QuantScheme, power: torch.Tensor | None) -> float:
        weight = self.weights.tensor(matrix).float()
        error = quantize_data_free(weight, nearest(scheme), matrix).dequantize().sub_(weight)
        return float(error.square().sum()) if power is None else output_error(error, power)


def _units(sites: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Every parameter once, with those of the first site that it is seen at."""
    taken: set[str] = set()
    units = []
    for site in sites:
        unit = tuple(dict.fromkeys(name for name in site if name not in taken))
        taken.update(unit)
        if unit:
            units.append(unit)
    return units
