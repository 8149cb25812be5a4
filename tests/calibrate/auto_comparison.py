"""One model's decoder under schemes and under `--quant auto`, judged on samples that chose nothing."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from vlmexport.calibrate.auto import choose_bits
from vlmexport.calibrate.judge import Divergence, Judge
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.sensitivity import decoder_part, held_out_batches
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.model.load import VLM, load_vlm
from vlmexport.plan import ExportPlan, OnnxOptions, WeightPlan, plan_export
from vlmexport.plan_file import AutoLimit, QuantPlan
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Split
from vlmexport.target import load_target

CHOOSING_SEED, JUDGING_SEED = 0, 1


@dataclass(frozen=True)
class Contender:
    """Bytes of all weights of the export, and the divergence on fresh samples."""

    size: int
    found: Divergence


class Comparison:
    """One model, and what its decoder's answers become under a scheme or a plan."""

    def __init__(self, model: str, samples: int = 256) -> None:
        self.vlm: VLM = load_vlm(model)
        self.split: Split = split_model(self.vlm)
        batches, _ = held_out_batches(self.vlm, CalibrationOptions(seed=JUDGING_SEED), 0, samples)
        self.judge = Judge(self.vlm.model, decoder_part(self.split), batches)

    def plan(self, options: OnnxOptions) -> ExportPlan:
        """What a CPU export would do."""
        return plan_export(self.vlm, self.split, load_target("cpu"), options)

    def uniform(self, scheme: QuantScheme) -> Contender:
        return self.judged(OnnxOptions(scheme=scheme))

    def auto(self, base: QuantScheme, limit: AutoLimit) -> tuple[QuantPlan, Contender]:
        def planner(scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
            return self.plan(OnnxOptions(scheme=scheme, keep=keep)).weights

        options = CalibrationOptions(seed=CHOOSING_SEED)
        with tempfile.TemporaryDirectory() as work:
            chosen = choose_bits(self.vlm, self.split, planner, base, limit, options, Path(work), SilentProgress())
        return chosen, self.judged(chosen.apply(OnnxOptions()))

    def judged(self, options: OnnxOptions) -> Contender:
        plan, chosen = self.plan(options), CalibrationOptions(seed=CHOOSING_SEED)
        with tempfile.TemporaryDirectory() as work:
            weights, _ = decoder_weights(self.vlm, self.split, plan.schemes, chosen, Path(work), SilentProgress())
            values = {name: weights.tensor(name) for name in weights.folds}
            values |= {name: weights.quantized(name).dequantize() for name in plan.schemes}
        with self.judge.ready():
            return Contender(plan.bytes_after, self.judge.divergence(values))
