"""What a quantization costs the bundled model on its frozen questions, teacher-forced, in PyTorch.

The decoder runs on the embeddings that the original vision side makes, once per question and answer; only its weights
change between methods, so a method costs seconds. Numbers of the exported graphs themselves come from the gate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmexport import demo
from vlmexport.calibrate.capture import Batch, capture_batches
from vlmexport.calibrate.conversation import Turn
from vlmexport.calibrate.dataset import CalibrationSample
from vlmexport.calibrate.recipe import CalibrationOptions, Recipe
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.model.load import VLM, load_vlm
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Role, Split
from vlmexport.target import load_target


@dataclass(frozen=True)
class Quality:
    """Mean KL in nats per answer token, shares of answer tokens and of whole answers that are right."""

    kl: float
    top1: float
    accuracy: float


class Judge:
    """A model with its frozen questions, ready to judge weights."""

    def __init__(self, folder: Path, count: int | None = None) -> None:
        self.vlm: VLM = load_vlm(str(folder))
        self.vlm.model.float()
        self.split: Split = split_model(self.vlm)
        self.runner = TorchRunner(self.vlm, self.split)
        self.decoder = self.split.parts[Role.DECODER].module
        questions = demo.frozen_questions()
        step = 1 if count is None else max(1, len(questions) // count)
        samples = [
            CalibrationSample((q.image,), (Turn("user", q.question), Turn("assistant", q.answers[0])), q.task)
            for q in questions[::step]
        ]
        self.batches = list(capture_batches(self.vlm, samples, Recipe("questions", batch_size=32)))
        self.reference = [self._logits(batch) for batch in self.batches]

    def weights(self, scheme: QuantScheme, calibration: CalibrationOptions | None = None) -> DecoderWeights:
        """The weights that `scheme` makes (kept in memory: the work folder is gone when this returns)."""
        plan = plan_export(self.vlm, self.split, load_target("cpu"), OnnxOptions(scheme=QuantScheme()))
        schemes = {name: scheme.for_weight(name) for name in plan.schemes}
        with tempfile.TemporaryDirectory() as folder:
            options = calibration or CalibrationOptions()
            made, _ = decoder_weights(self.vlm, self.split, schemes, options, Path(folder) / "work", SilentProgress())
            given = {name: made.quantized(name) for name in schemes}
        return DecoderWeights(made.tensors, made.schemes, given, made.folds)

    def original(self) -> Quality:
        """The model itself."""
        return self._judge()

    def judge(self, weights: DecoderWeights) -> Quality:
        """The model with `weights` in its decoder."""
        with self._with(weights):
            return self._judge()

    @contextmanager
    def _with(self, weights: DecoderWeights) -> Iterator[None]:
        changed: Mapping[str, torch.Tensor] = {
            **weights.folded(), **{name: codes.dequantize() for name, codes in weights.given.items()}
        }  # fmt: skip
        with self.runner.substituted(changed):
            yield

    def _judge(self) -> Quality:
        pairs = zip(self.batches, self.reference, strict=True)
        rows = [_compare(batch, wanted, self._logits(batch)) for batch, wanted in pairs]
        kl, right, answers = (torch.cat([row[i] for row in rows]) for i in range(3))
        return Quality(float(kl.mean()), float(right.double().mean()), float(answers.double().mean()))

    def _logits(self, batch: Batch) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            hidden = self.decoder.decoder(**batch.kwargs).last_hidden_state
            return [self.decoder.head(hidden)]


def _compare(
    batch: Batch, wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL and hits per answer token, and whether each answer is right from its first token to its last."""
    answer = batch.answer[:, 1:]
    before, after = wanted[0][:, :-1].log_softmax(-1), got[0][:, :-1].log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    hits = after.argmax(-1) == batch.input_ids[:, 1:]
    return kl[answer], hits[answer], (hits | ~answer).all(1)
