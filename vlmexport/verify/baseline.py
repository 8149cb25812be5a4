"""A report against an earlier one that was kept: what became worse, although it is still within its limit.

The baseline is what ``vlmexport verify DIR --json FILE`` wrote. Every number that both reports have is compared in its
own direction (errors and losses up, agreement and accuracy down are worse). A change counts only when it is larger than
`NOISE` of the check's limit, since another CPU rounds otherwise; a check that ran then and is missing now counts, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmexport.errors import BadInputError
from vlmexport.verify.result import Check, ParityReport, Question, Status

NOISE = 0.01
_KEYS = ("status", "metric", "value", "limit")
# What must be the same for numbers to be comparable.
_SAME = ("target", "questions")
_PREFIX = "baseline/"
_QUESTION: Question = "quantization"
# Numbers of the summary beside the checks, and the side that is good. Accuracies are shares, the others as documented.
_SUMMARY = {"kl": "<=", "top1": ">=", "perplexity_ratio": "<=", "accuracy": ">="}
# What a change of the summary's numbers has to exceed to be more than rounding.
_SUMMARY_NOISE = {"kl": 1e-4, "top1": 1e-3, "perplexity_ratio": 1e-3, "accuracy": 0.0}


@dataclass(frozen=True)
class Baseline:
    """An earlier report: its file, its checks by name, its summary of the quantization, and of what it was made."""

    path: Path
    checks: Mapping[str, Mapping[str, Any]]
    quantization: Mapping[str, float | None]
    made_of: Mapping[str, Any]


def read_baseline(path: Path) -> Baseline:
    """Read what ``verify --json`` wrote; raises `BadInputError` for a file that is missing or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path} does not exist; `vlmexport verify DIR --json {path}` writes a baseline") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInputError(f"{path} is not a report of `vlmexport verify --json`: {error}") from error
    try:
        every = {check["name"]: check for check in data["checks"]}
        checks = {name: check for name, check in every.items() if not name.startswith(_PREFIX)}
        numbers = {name: {key: check[key] for key in _KEYS} for name, check in checks.items()}
        summary = {key: data["quantization"][key] for key in _SUMMARY}
        made_of = {key: data["runtime"].get(key) for key in _SAME}
    except (TypeError, KeyError, AttributeError) as error:
        raise BadInputError(f"{path} is not a report of `vlmexport verify --json`: {error!r} is missing") from error
    values = [*summary.values(), *(check[key] for check in numbers.values() for key in ("value", "limit"))]
    if not numbers or not all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values):
        raise BadInputError(f"{path} is not a report of `vlmexport verify --json`: it has no checks with numbers")
    return Baseline(path, numbers, summary, made_of)


def against_baseline(report: ParityReport, baseline: Baseline, max_regression: float) -> ParityReport:
    """`report` with one more check for each number that the baseline has, under ``baseline/``.

    `max_regression` is the share by which a number may be worse than it was (0.05: 5 %). Raises `BadInputError` for a
    baseline of another target or other questions.
    """
    for key, was in baseline.made_of.items():
        found = report.runtime.get(key)
        if was != found:
            raise BadInputError(
                f"{baseline.path} was made with {key} {was!r}, this report with {found!r}; make a new one"
            )
    now = {check.name: check for check in report.checks}
    known = [(check, baseline.checks[name]) for name, check in now.items() if name in baseline.checks]
    made = [_compared(check, before, max_regression) for check, before in known]
    summary = report.to_dict()["quantization"]
    made += [_summary_check(key, summary.get(key), baseline.quantization.get(key), max_regression) for key in _SUMMARY]
    judged = [check for check in made if check is not None]
    return dataclasses.replace(report, checks=(*report.checks, *judged, _complete(now, baseline)))


def _compared(check: Check, before: Mapping[str, Any], share: float) -> Check | None:
    """The check of one number; None where one of the reports has none."""
    old, limit = before["value"], before["limit"]
    if old is None or limit is None or check.status == "not_run":
        return None
    good = "<=" if check.metric.endswith("<=") else ">="
    value = math.nan if check.value is None else check.value
    return _judged(check.name, check.part, check.question, good, (value, old), share, NOISE * abs(limit))


def _summary_check(key: str, value: float | None, old: float | None, share: float) -> Check | None:
    if old is None:
        return None
    value = math.nan if value is None else value  # a number that is gone is no better than a bad one
    noise = _SUMMARY_NOISE[key]
    return _judged(f"summary/{key}", "decoder", _QUESTION, _SUMMARY[key], (value, old), share, noise)


def _judged(
    name: str, part: str, question: Question, good: str, values: tuple[float, float], share: float, noise: float
) -> Check:
    value, old = values
    worse = value - old if good == "<=" else old - value
    room = max(abs(old) * share, noise)
    limit = old + room if good == "<=" else old - room
    passed = math.isfinite(value) and worse <= room
    percent = f"{100 * worse / abs(old):.1f} %" if old else f"{worse:.3g}"
    reason = (
        "" if passed else f"{value:.4g}, {percent} worse than the baseline's {old:.4g} (allowed: {100 * share:g} %)"
    )
    status: Status = "passed" if passed else "failed"
    return Check(f"{_PREFIX}{name}", part, question, status, f"value {good}", value, limit, reason)


def _complete(now: Mapping[str, Check], baseline: Baseline) -> Check:
    """Everything that ran for the baseline has run again."""
    ran = [name for name, check in baseline.checks.items() if check["status"] != "not_run"]
    lost = sorted(name for name in ran if name not in now or now[name].status == "not_run")
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    reason = f"{baseline.path.name} has checks that did not run: {', '.join(lost[:3])}{more}" if lost else ""
    status: Status = "failed" if lost else "passed"
    return Check(f"{_PREFIX}complete", "model", "lowering", status, "checks that did not run <=", len(lost), 0, reason)
