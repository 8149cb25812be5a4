"""A gate for CI: ``pytest parity_tests --export DIR``. The judging code is `vlmexport.verify`; this only reports it."""

from __future__ import annotations

import pytest

from vlmexport.verify.report.words import compact
from vlmexport.verify.result import Check, ParityReport


def test_check(check: Check) -> None:
    if check.status == "not_run":
        pytest.skip(check.reason)
    measured = f"{check.part}: {check.metric} {compact(check.limit)}, measured {compact(check.value)}"
    assert check.status == "passed", f"{measured} {check.reason}".strip()


def test_everything_ran(report: ParityReport, request: pytest.FixtureRequest) -> None:
    missing = [f"{check.name} ({check.reason})" for check in report.not_run()]
    if missing and request.config.getoption("--allow-not-run"):
        pytest.skip(f"accepted with --allow-not-run: {missing}")
    assert not missing, f"{len(missing)} checks did not run; --allow-not-run accepts that"
