"""``--quant auto``: 4, 8 or 16 bits and a group size for every decoder weight, so that a limit is met.

The effect of each unit (the weights that read one input) alone is measured under the base scheme and scaled to the
other candidates; their sums say which choices are worth considering for each size (`allocation.frontier`). What is
chosen of those is measured on the whole decoder, with the codes of the calibration that an export will run. Uniform
schemes of the same size take part, so that the choice is no worse than they are on the samples that choose.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.calibrate.allocation import Allocation, Choice, frontier
from vlmexport.calibrate.candidates import SMALL, Candidates, Planner, find_candidates
from vlmexport.calibrate.effects import UnitEffect, stored, unit_effects
from vlmexport.calibrate.judge import Divergence, Judge
from vlmexport.calibrate.recipe import CalibrationOptions, resolve_recipe
from vlmexport.calibrate.sensitivity import decoder_part, held_out_batches
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.errors import BadInputError
from vlmexport.plan import ExportPlan, OnnxOptions, head_weight_name, plan_export
from vlmexport.plan_file import AutoLimit, QuantPlan, model_fingerprint
from vlmexport.prefill import prompt_bytes, prompt_schemes
from vlmexport.progress import Progress
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.weights import DecoderWeights

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.plan import WeightPlan
    from vlmexport.split.parts import Split
    from vlmexport.target import Target

HELD_OUT_SAMPLES = 128
# How often a limit of divergence is tried for: a calibrated trial costs a calibration.
_TRIALS, _CALIBRATIONS = 12, 4
# The share of the limit that a trial aims at.
_MARGIN = 0.95


def settle_bits(
    vlm: VLM,
    split: Split,
    target: Target,
    options: OnnxOptions,
    calibration: CalibrationOptions,
    work: Path,
    progress: Progress,
) -> tuple[OnnxOptions, QuantPlan | None]:
    """`options` with the bits of every weight settled, and the plan that says so (None: there was nothing to settle).

    A plan file is checked against `vlm` and applied; ``--quant auto`` makes a plan for its limit first. Raises
    `BadInputError` as `choose_bits` does, for a plan of another model, and for a checkpoint that is quantized already.
    """
    if options.choice is None:
        return options, None
    plain, head = dataclasses.replace(options, choice=None), head_weight_name(vlm)

    def planner(scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
        asked = dataclasses.replace(plain, scheme=scheme, keep=(*plain.keep, *keep))
        return with_prompt_bytes(plan_export(vlm, split, target, asked), head)

    base = plain.scheme or make_scheme()
    plan = settle_choice(vlm, split, planner, base, options.choice, calibration, work, progress)
    return plan.apply(plain), plan


def with_prompt_bytes(plan: ExportPlan, head: str) -> tuple[WeightPlan, ...]:
    """The weights of `plan` (LM head: `head`), each with the bytes that ``--prefill int8`` adds for it."""
    if plan.options.prefill == "same":
        return plan.weights
    own = prompt_schemes(plan.weights, head)
    return tuple(
        dataclasses.replace(
            w, bytes_after=w.bytes_after + (prompt_bytes(plan.by_name, [w.name]) if w.name in own else 0)
        )
        for w in plan.weights
    )


def settle_choice(
    vlm: VLM,
    split: Split,
    planner: Planner,
    base: QuantScheme,
    choice: AutoLimit | QuantPlan,
    calibration: CalibrationOptions,
    work: Path,
    progress: Progress,
) -> QuantPlan:
    """The plan that `choice` is, checked against `vlm`, or the one that meets it; for any kind of export.

    Raises `BadInputError` as `settle_bits` does.
    """
    if vlm.quantized is not None:
        raise BadInputError(f"{vlm.source} is quantized already and keeps its codes; leave --quant auto and --plan out")
    if isinstance(choice, QuantPlan):
        choice.check(vlm)
        return choice
    return choose_bits(vlm, split, planner, base, choice, calibration, work, progress)


def choose_bits(
    vlm: VLM,
    split: Split,
    planner: Planner,
    base: QuantScheme,
    limit: AutoLimit,
    options: CalibrationOptions,
    work: Path,
    progress: Progress,
) -> QuantPlan:
    """Choose bits and groups for each weight that `planner` quantizes under `base` (4 bits, without overrides).

    With `limit.max_kl` the smallest export found whose divergence on held-out samples stays under the limit with 95 %
    confidence; with `limit.max_size` the one of the least divergence that fits. A calibrated `base` leaves its finished
    layers in `work`, where the export with the plan finds them.

    Raises `BadInputError` for a limit that cannot be met, with the smallest size or divergence that can.
    """
    found = find_candidates(planner, base)
    if limit.max_size is not None:
        _check_size(found, limit.max_size)
    chooser = _Chooser(vlm, split, found, base, options, work, progress)
    allocations = chooser.frontier()
    if limit.max_size is not None:
        best = chooser.best_within(allocations, limit.max_size)
    else:
        best = chooser.cheapest(allocations, limit.max_kl or 0.0)
    return chooser.plan(best, limit)


def _check_size(found: Candidates, max_size: int) -> None:
    smallest = found.smallest
    if smallest > max_size:
        raise BadInputError(
            f"--max-size {max_size} bytes cannot be met: with every quantizable weight at {SMALL} bits in the "
            f"largest groups the weights take {smallest} bytes ({smallest / 1e6:.2f} MB); --keep, --lm-head fp16 and "
            "the vision side's --encoder-dtype decide the rest"
        )


@dataclass(frozen=True)
class _Trial:
    """An allocation that was tried: the candidates' numbers by weight, bytes of the export, estimate and truth."""

    picks: Mapping[str, int]
    size: int
    estimate: float
    found: Divergence


class _Chooser:
    """The measurements of one choice."""

    def __init__(
        self,
        vlm: VLM,
        split: Split,
        candidates: Candidates,
        base: QuantScheme,
        options: CalibrationOptions,
        work: Path,
        progress: Progress,
    ) -> None:
        self.vlm, self.split, self.candidates, self.base = vlm, split, candidates, base
        self.options, self.work, self.progress = options, work, progress
        recipe = resolve_recipe(options)
        skip = recipe.samples if base.calibrated else 0
        with progress.stage("held-out samples"):
            batches, self.notes = held_out_batches(vlm, options, skip, HELD_OUT_SAMPLES)
        self.judge = Judge(vlm.model, decoder_part(split), batches)
        self.units: list[UnitEffect] = []
        self.uniform: dict[str, dict[str, float]] = {}

    def frontier(self) -> list[Allocation]:
        """The allocations worth considering, by what each unit does alone."""
        every = self.candidates.every
        weights = self._weights(dict.fromkeys(self.candidates.names, 0))
        schemes = [candidate.schemes for candidate in every]
        with self.judge.ready():
            self.units = unit_effects(self.judge, weights, schemes, self.candidates.names, self.progress)
        return frontier({unit.name: self._choices(unit) for unit in self.units})

    def best_within(self, allocations: Sequence[Allocation], max_size: int) -> _Trial:
        """The best of the least estimate that fits, the largest uniform scheme that fits, and the base scheme."""
        fitting = [a for a in allocations if self.candidates.fixed + a.size <= max_size]
        trials = [self._trial(self._picks(fitting[-1]))]
        uniform = {i: size for i, size in self.candidates.uniform().items() if size <= max_size}
        even = {max(uniform, key=lambda i: uniform[i])} if uniform else set()
        for index in sorted(even | ({0} & uniform.keys())):
            trial = self._trial(dict.fromkeys(self.candidates.names, index))
            label = self.candidates.every[index].label
            self.uniform[label] = {"bytes": trial.size, "kl": trial.found.kl}
            trials.append(trial)
        return min(trials, key=lambda trial: trial.found.kl)

    def cheapest(self, allocations: Sequence[Allocation], max_kl: float) -> _Trial:
        """The smallest allocation found whose divergence is surely below `max_kl`.

        The truth is taken for proportional to the estimate; every trial corrects the factor.
        """
        best, last = None, self._trial(dict.fromkeys(self.candidates.names, 0))
        if last.found.upper <= max_kl:
            best = last
        low, high = -1, len(allocations)  # `low` is not enough, `high` is
        if best is not None:
            high = next((i for i, a in enumerate(allocations) if self.candidates.fixed + a.size >= best.size), high)
        for _ in range(_CALIBRATIONS if self.base.calibrated else _TRIALS):
            if high - low <= 1:
                break
            factor = last.found.upper / last.estimate if last.estimate > 0 else 1.0
            enough = (i for i, a in enumerate(allocations) if a.kl * factor <= _MARGIN * max_kl)
            guess = min(max(next(enough, high - 1), low + 1), high - 1)
            last = self._trial(self._picks(allocations[guess]))
            if last.found.upper <= max_kl:
                best, high = last, guess
            else:
                low = guess
        return best or self._most(allocations[-1], max_kl)

    def _most(self, allocation: Allocation, max_kl: float) -> _Trial:
        """The largest allocation; `BadInputError` when even that misses the limit."""
        trial = self._trial(self._picks(allocation))
        if trial.found.upper <= max_kl:
            return trial
        raise BadInputError(
            f"--max-kl {max_kl:g} cannot be met: the smallest divergence that the choices give is {trial.found.kl:.2e} "
            f"nats per token (95 % limit {trial.found.upper:.2e})"
        )

    def plan(self, best: _Trial, limit: AutoLimit) -> QuantPlan:
        """The choice as a plan, with what was estimated and measured."""
        self._keep_layers(best)
        every = self.candidates.every
        overrides = {n: s for n, i in best.picks.items() if i and (s := every[i].scheme) is not None}
        keep = tuple(name for name, i in best.picks.items() if every[i].scheme is None)
        counts = Counter(best.picks.values())
        labels = {every[i].label: counts[i] for i in sorted(counts)}
        numbers = {"bytes": best.size, "weights_by_choice": labels, "uniform": self.uniform}
        return QuantPlan(
            self.vlm.facts.architecture,
            model_fingerprint(self.vlm.path, self.vlm.adapter_files),
            dataclasses.replace(self.base, overrides=overrides),
            keep,
            limit.to_dict(),
            {"kl": best.estimate},
            {**asdict(best.found), **numbers},
            {"recipe": resolve_recipe(self.options).to_dict(), "notes": self.notes},
        )

    def _choices(self, unit: UnitEffect) -> list[Choice]:
        every = self.candidates.every
        possible = [i for i, c in enumerate(every) if all(name in c.sizes for name in unit.names)]
        return [Choice(i, self._size(unit.names, i), unit.under(i)) for i in possible]

    def _size(self, names: Sequence[str], index: int) -> int:
        return sum(self.candidates.every[index].sizes[name] for name in names)

    def _picks(self, allocation: Allocation) -> dict[str, int]:
        chosen = {name: allocation.candidates[unit.name] for unit in self.units for name in unit.names}
        return {name: chosen[name] for name in self.candidates.names}

    def _trial(self, picks: Mapping[str, int]) -> _Trial:
        """Measure an allocation on the whole decoder, with the codes that an export would have."""
        weights = self._weights(picks)
        floats = {name: weights.tensor(name) for name in weights.folds}
        with self.judge.ready():
            found = self.judge.divergence({**floats, **{n: stored(weights, n) for n in weights.schemes}})
        size = self.candidates.fixed + sum(self._size([name], index) for name, index in picks.items())
        estimate = sum(unit.under(picks[unit.name]) for unit in self.units)
        return _Trial(picks, size, estimate, found)

    def _weights(self, picks: Mapping[str, int]) -> DecoderWeights:
        every = self.candidates.every
        schemes = {n: s for n, i in picks.items() if (s := every[i].scheme) is not None}
        folder = self._folder(picks)
        weights, _ = decoder_weights(self.vlm, self.split, schemes, self.options, folder, self.progress)
        return weights

    def _folder(self, picks: Mapping[str, int]) -> Path:
        """Where the finished layers of a trial are, so that neither a second look nor a resumed run repeats them."""
        digest = hashlib.sha256(repr(sorted(picks.items())).encode()).hexdigest()
        return self.work / f"trial-{digest[:16]}"

    def _keep_layers(self, best: _Trial) -> None:
        """Leave the finished layers of the choice where its export looks for them, and no others."""
        chosen = self._folder(best.picks)
        if chosen.is_dir():
            for file in chosen.iterdir():
                file.rename(self.work / file.name)
        for folder in self.work.glob("trial-*"):
            shutil.rmtree(folder)
