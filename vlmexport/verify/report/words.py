"""Words and groupings that the console and the page share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmexport.verify.result import Check, ParityReport

_PART_LABELS = {
    "processor": "The processor",
    "vision_encoder": "The vision encoder",
    "projector": "The projector",
    "embed_tokens": "The token embedding",
    "decoder": "The decoder",
    "model": "The whole model",
    "runtime": "The runtime",
}
_SEVERITY = {"failed": 2, "not_run": 1, "passed": 0}


@dataclass(frozen=True)
class CheckGroup:
    """Checks of one kind (``decoder/prefill[square]``, ``[wide]``, …): their number and the worst of them."""

    name: str
    count: int
    worst: Check


def reference_name(report: ParityReport) -> str:
    """What the export was compared with: the original, or the quantized checkpoint whose codes it keeps."""
    return "the quantized checkpoint" if report.runtime.get("reference_codes") else "the original"


def lowering_subject(report: ParityReport) -> str:
    """What the lowering error is the error of, as a sentence."""
    if report.runtime.get("target") == "llamacpp":
        return "llama.cpp against PyTorch with the weights that the files hold."
    return "The graphs against PyTorch with the same codes."


def part_label(part: str) -> str:
    """The part's name for the start of a sentence."""
    return _PART_LABELS.get(part, part)


def compact(value: float | None) -> str:
    """A number in at most about eight characters; ``-`` for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (1e-3 <= abs(value) < 1e5):
        return f"{value:.4g}"
    return f"{value:.2e}"


def percent(share: float | None) -> str:
    """A share as per cent with one decimal; ``-`` for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def ratio(value: float | None) -> str:
    """A ratio near 1 with four decimals; ``-`` for None."""
    return "-" if value is None else f"{value:.4f}"


def group_checks(checks: Sequence[Check], *, every_check: bool = False) -> list[CheckGroup]:
    """Checks grouped by their name without ``[probe]``, in order; one group each with `every_check`."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        name = check.name if every_check else check.name.partition("[")[0]
        groups.setdefault((name, check.part), []).append(check)
    return [CheckGroup(name, len(members), max(members, key=_badness)) for (name, _), members in groups.items()]


def share_of_limit(check: Check) -> float:
    """How much of its limit a check uses: 1 is at the limit, 0 is no error; infinite without a number."""
    if check.value is None or check.limit is None or not math.isfinite(check.value):
        return math.inf
    if check.metric.endswith(">="):
        return (1 - check.value) / (1 - check.limit) if check.limit < 1 else math.inf
    return check.value / check.limit if check.limit else float(check.value > 0)


def _badness(check: Check) -> tuple[int, float]:
    return _SEVERITY[check.status], share_of_limit(check)
