"""One report of an export with several variants: every variant judged in full, none silently left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vlmexport.verify.result import ParityReport


def of_variants(reports: Mapping[str, ParityReport]) -> ParityReport:
    """The reports of the variants by name, the primary one first, as one.

    Checks and series of a variant are named ``<variant>:<check>``; the summaries and tasks are the primary one's, and
    those of the others stand in ``runtime["variants"]``. A report of an export without variants (named "") stays.
    """
    names = list(reports)
    first = reports[names[0]]
    if names == [""]:
        return first
    return ParityReport(
        checks=tuple(
            dataclasses.replace(check, name=f"{name}:{check.name}")
            for name, report in reports.items()
            for check in report.checks
        ),
        lowering=first.lowering,
        quantization=first.quantization,
        series={f"{name}:{series}": values for name, r in reports.items() for series, values in r.series.items()},
        runtime={
            **first.runtime,
            "seconds": reports[names[-1]].runtime["seconds"],
            "variants": {name: _summary(report) for name, report in reports.items()},
        },
        tasks=first.tasks,
        answers=first.answers,
    )


def _summary(report: ParityReport) -> dict[str, object]:
    """Status, lowering and quantization of one variant as JSON data."""
    data = report.to_dict()
    return {key: data[key] for key in ("status", "lowering", "quantization")}
