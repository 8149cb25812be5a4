"""What a gate says: `Check` for one comparison, `ParityReport` for a whole run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "not_run"]
Overall = Literal["passed", "failed", "incomplete"]
Question = Literal["lowering", "quantization"]


@dataclass(frozen=True)
class Check:
    """One judged comparison.

    `part` is the part of the export that fails with it (a role of the manifest, or ``processor``); `metric` says what
    `value` and `limit` measure and which side is good (``"rel <="``); both are None where the metric has no number.
    `reason` is the sentence for a person: what failed or why it did not run.
    """

    name: str
    part: str
    question: Question
    status: Status
    metric: str
    value: float | None = None
    limit: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The check with the documented keys; a value that JSON cannot hold (NaN, infinity) becomes null."""
        return {
            "name": self.name,
            "part": self.part,
            "status": self.status,
            "metric": self.metric,
            "value": _number(self.value),
            "limit": _number(self.limit),
        }


@dataclass(frozen=True)
class LoweringSummary:
    """Error of the lowering: artifact in its runtime against PyTorch with the same dequantized codes.

    `max_abs_logit` is the largest difference of a logit in exact mode; `kl` (nats per token) and `top1` (share) are of
    the artifact as shipped. None where it was not measured.
    """

    max_abs_logit: float | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class QuantizationSummary:
    """Loss of the quantization: artifact as shipped against the original model, on answer tokens.

    `kl` in nats per token, `top1` and the accuracies as shares, `perplexity_ratio` artifact over original.
    """

    kl: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on one task of the questions: shares of `questions`, for the artifact and the original model."""

    task: str
    questions: int
    accuracy: float
    reference_accuracy: float


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question with accepted answers, and what the export and the original model said.

    `images` are the picture files. `correct` and `reference_correct`: is it one of the `accepted` ones?
    """

    task: str
    question: str
    images: tuple[str, ...]
    accepted: tuple[str, ...]
    answer: str
    reference_answer: str
    correct: bool
    reference_correct: bool


@dataclass(frozen=True)
class ParityReport:
    """The result of ``verify``.

    `series` holds named number series for plots (per decode step); `runtime` says what ran it (provider, versions,
    threads, seconds). `answers`: every question with accepted answers, in the order in which they were asked.
    """

    checks: tuple[Check, ...]
    lowering: LoweringSummary = field(default_factory=LoweringSummary)
    quantization: QuantizationSummary = field(default_factory=QuantizationSummary)
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[TaskAccuracy, ...] = ()
    answers: tuple[AnsweredQuestion, ...] = ()

    @property
    def status(self) -> Overall:
        """``failed`` if any check failed, else ``incomplete`` if any did not run, else ``passed``."""
        return overall(self.checks)

    def status_of(self, question: Question) -> Overall:
        """The status of one of the two questions; a question without any check is ``incomplete``."""
        return overall(tuple(c for c in self.checks if c.question == question))

    def failures(self) -> tuple[Check, ...]:
        """The failed checks, in the order they were made (from the pixels to the answer)."""
        return tuple(c for c in self.checks if c.status == "failed")

    def not_run(self) -> tuple[Check, ...]:
        """The checks that could not run."""
        return tuple(c for c in self.checks if c.status == "not_run")

    def to_dict(self) -> dict[str, Any]:
        """The report as strict JSON data, with the keys of the CLI reference."""
        return {
            "status": self.status,
            "lowering": {
                "status": self.status_of("lowering"),
                "max_abs_logit": _number(self.lowering.max_abs_logit),
                "kl": _number(self.lowering.kl),
                "top1": _number(self.lowering.top1),
            },
            "quantization": {
                "status": self.status_of("quantization"),
                "kl": _number(self.quantization.kl),
                "top1": _number(self.quantization.top1),
                "perplexity_ratio": _number(self.quantization.perplexity_ratio),
                "accuracy": _number(self.quantization.accuracy),
                "reference_accuracy": _number(self.quantization.reference_accuracy),
            },
            "checks": [c.to_dict() for c in self.checks],
            "runtime": self.runtime,
            "details": {
                "reasons": {c.name: c.reason for c in self.checks if c.reason},
                "series": {name: [_number(v) for v in values] for name, values in self.series.items()},
                "tasks": [dataclasses.asdict(task) for task in self.tasks],
                "answers": [dataclasses.asdict(answer) for answer in self.answers],
            },
        }


def overall(checks: tuple[Check, ...]) -> Overall:
    """One status for several checks: failed before incomplete before passed; no check at all is incomplete."""
    statuses = {c.status for c in checks}
    if "failed" in statuses:
        return "failed"
    return "incomplete" if "not_run" in statuses or not statuses else "passed"


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
