"""Options of the gate: which export, against which model, and what may be missing on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmexport.verify.result import ParityReport
from vlmexport.verify.run import verify_artifact

_REPORT = pytest.StashKey[ParityReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vlmexport")
    group.addoption("--export", metavar="DIR", help="the export to judge (required)")
    group.addoption("--model", metavar="MODEL", help="the original model; default: where the export came from")
    group.addoption("--samples", metavar="FILE", help="JSON Lines file of your own questions")
    group.addoption("--all-questions", action="store_true", help="all frozen questions of the bundled model")
    group.addoption("--allow-not-run", action="store_true", help="pass although something could not run here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        checks = _report(metafunc.config).checks
        metafunc.parametrize("check", checks, ids=[check.name for check in checks])


@pytest.fixture
def report(request: pytest.FixtureRequest) -> ParityReport:
    return _report(request.config)


def _report(config: pytest.Config) -> ParityReport:
    """The one run of the gate that all tests look at."""
    if _REPORT not in config.stash:
        export = config.getoption("--export")
        if not export:
            raise pytest.UsageError("give the export to judge: pytest parity_tests --export DIR")
        samples = config.getoption("--samples")
        config.stash[_REPORT] = verify_artifact(
            Path(export),
            model=config.getoption("--model"),
            samples=Path(samples) if samples else None,
            questions="all" if config.getoption("--all-questions") else "sample",
        )
    return config.stash[_REPORT]
