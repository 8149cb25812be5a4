"""`Gate`: turns measurements into checks. The only place where a value meets its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vlmexport.errors import VlmExportError
from vlmexport.runtime.protocol import PartOutputError
from vlmexport.verify import metrics
from vlmexport.verify.metrics import Array
from vlmexport.verify.result import Check, Question, Status


class NotRunError(Exception):
    """Raised inside a gate when a comparison cannot be made here; the message is the reason."""


def runtime_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which a broken graph or a missing output shows itself when it is run."""
    from google.protobuf.message import DecodeError
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, DecodeError, VlmExportError, KeyError, IndexError, ValueError, RuntimeError)


@dataclass
class Gate:
    """Collects the checks of one run and tells `progress` of each.

    A value that is not finite never passes, whichever side of the limit it is on.
    """

    progress: Callable[[str], None] | None = None
    checks: list[Check] = field(default_factory=list)
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def at_most(
        self, name: str, part: str, question: Question, value: float, limit: float, metric: str = "rel"
    ) -> None:
        """Pass when ``value <= limit`` (and finite)."""
        passed = value <= limit and abs(value) != float("inf")
        self._add(Check(name, part, question, _status(passed), f"{metric} <=", value, limit))

    def at_least(self, name: str, part: str, question: Question, value: float, limit: float, metric: str) -> None:
        """Pass when ``value >= limit`` (and finite)."""
        passed = value >= limit and abs(value) != float("inf")
        self._add(Check(name, part, question, _status(passed), f"{metric} >=", value, limit))

    def close(
        self, name: str, part: str, question: Question, reference: Array, value: Array | None, limit: float
    ) -> float:
        """Judge the relative error of `value`; a missing, empty, misshapen or non-finite array fails with its fault.

        Returns the largest absolute difference (inf for a fault).
        """
        fault = metrics.output_fault(reference, value)
        if fault or value is None:
            self.fail(name, part, question, fault, metric="rel <=", limit=limit)
            return float("inf")
        self.at_most(name, part, question, metrics.relative_error(reference, value), limit)
        return metrics.max_abs_difference(reference, value)

    def verdict(self, name: str, part: str, question: Question, faults: list[str], metric: str) -> None:
        """Pass when `faults` is empty; the value is their number, the reason names the first of them."""
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        reason = f"{faults[0]}{more}" if faults else ""
        self._add(Check(name, part, question, _status(not faults), f"{metric} <=", float(len(faults)), 0.0, reason))

    def fail(
        self, name: str, part: str, question: Question, reason: str, *, metric: str = "runs", limit: float | None = None
    ) -> None:
        """A check that failed without a number."""
        self._add(Check(name, part, question, "failed", metric, None, limit, reason))

    def not_run(self, name: str, part: str, question: Question, reason: str, metric: str = "runs") -> None:
        """A check that was asked for and could not be made here."""
        self._add(Check(name, part, question, "not_run", metric, None, None, reason))

    @contextmanager
    def guard(self, name: str, part: str, question: Question) -> Iterator[None]:
        """Turn an error of the artifact's runtime inside the block into a failed check.

        It is charged to the part that the error names, or else to `part`. `NotRunError` becomes a check that did not
        run.
        """
        try:
            yield
        except NotRunError as error:
            self.not_run(name, part, question, str(error))
        except PartOutputError as error:
            self.fail(name, error.part, question, str(error))
        except runtime_errors() as error:
            self.fail(name, part, question, _one_line(error))

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        if self.progress is not None:
            self.progress(check.name)


def _status(passed: bool) -> Status:
    return "passed" if passed else "failed"


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
