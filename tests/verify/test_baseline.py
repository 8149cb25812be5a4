"""A report against an earlier one: what is worse turns red, what is rounding does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmexport.errors import BadInputError
from vlmexport.verify.baseline import against_baseline, read_baseline
from vlmexport.verify.result import Check, ParityReport, QuantizationSummary, Status

EXACT = Check("decoder/prefill", "decoder", "lowering", "passed", "rel <=", 2e-6, 1e-4)
KL = Check("quantization/kl", "decoder", "quantization", "passed", "KL <=", 0.010, 0.05)
TOP1 = Check("quantization/top1", "decoder", "quantization", "passed", "share >=", 0.980, 0.9)
LOSS = QuantizationSummary(kl=0.010, top1=0.980, perplexity_ratio=1.01, accuracy=0.92)


def report(*checks: Check, summary: QuantizationSummary = LOSS, questions: int = 100) -> ParityReport:
    runtime = {"target": "cpu", "questions": questions}
    return ParityReport(checks or (EXACT, KL, TOP1), quantization=summary, runtime=runtime)


def changed(check: Check, value: float | None, status: Status = "passed") -> Check:
    return Check(check.name, check.part, check.question, status, check.metric, value, check.limit)


def failures(now: ParityReport, tmp_path: Path, share: float = 0.05) -> list[str]:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(report().to_dict()))
    return [check.name for check in against_baseline(now, read_baseline(file), share).failures()]


def test_the_same_numbers_pass_and_every_one_is_compared(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(report().to_dict()))
    judged = against_baseline(report(), read_baseline(file), 0.0)
    names = {check.name for check in judged.checks if check.name.startswith("baseline/")}
    assert names == {
        "baseline/decoder/prefill", "baseline/quantization/kl", "baseline/quantization/top1", "baseline/summary/kl",
        "baseline/summary/top1", "baseline/summary/perplexity_ratio", "baseline/summary/accuracy", "baseline/complete",
    }  # fmt: skip
    assert judged.status == "passed"


@pytest.mark.parametrize(
    ("check", "value", "red"),
    [
        (KL, 0.0104, False),
        (KL, 0.0120, True),
        (KL, 0.0001, False),
        (TOP1, 0.940, False),
        (TOP1, 0.925, True),
        (TOP1, 1.0, False),
        (EXACT, 2.9e-6, False),  # within 1 % of its limit: another CPU rounds otherwise
        (EXACT, 3.2e-6, True),
        (KL, float("nan"), True),
    ],
)
def test_worse_by_more_than_allowed_is_red(check: Check, value: float, red: bool, tmp_path: Path) -> None:
    others = [c for c in (EXACT, KL, TOP1) if c is not check]
    found = failures(report(changed(check, value), *others), tmp_path)
    assert found == ([f"baseline/{check.name}"] if red else [])


def test_the_summary_counts_too(tmp_path: Path) -> None:
    worse = QuantizationSummary(kl=0.02, top1=0.9, perplexity_ratio=1.2, accuracy=0.8)
    found = failures(report(summary=worse), tmp_path)
    assert found == [f"baseline/summary/{key}" for key in ("kl", "top1", "perplexity_ratio", "accuracy")]


def test_a_number_that_is_gone_is_red(tmp_path: Path) -> None:
    gone = QuantizationSummary(kl=0.010, top1=0.980, perplexity_ratio=1.01, accuracy=None)
    assert failures(report(changed(KL, None), EXACT, TOP1, summary=gone), tmp_path) == [
        "baseline/quantization/kl",
        "baseline/summary/accuracy",
    ]


def test_a_baseline_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="was made with questions 100, this report with 325"):
        failures(report(questions=325), tmp_path)


def test_a_check_that_no_longer_runs_is_red(tmp_path: Path) -> None:
    assert failures(report(EXACT, KL), tmp_path) == ["baseline/complete"]
    assert failures(report(EXACT, KL, changed(TOP1, None, "not_run")), tmp_path) == ["baseline/complete"]


def test_a_report_with_a_baseline_is_a_baseline(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(report().to_dict()))
    again = against_baseline(report(), read_baseline(file), 0.05)
    file.write_text(json.dumps(again.to_dict()))
    assert read_baseline(file).checks.keys() == {EXACT.name, KL.name, TOP1.name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"does not exist; `vlmexport verify DIR --json .*` writes a baseline"),
        ("{", "is not a report of `vlmexport verify --json`"),
        ("[]", "is not a report of `vlmexport verify --json`"),
        ('{"checks": [{"name": "x"}], "quantization": {}}', "is not a report of `vlmexport verify --json`"),
        ('{"checks": [], "quantization": {}, "runtime": {}}', "'kl'.* is missing"),
        ('{"checks": [], "quantization": null, "runtime": {}}', "is not a report of `vlmexport verify --json`"),
        (json.dumps({**report().to_dict(), "checks": []}), "it has no checks with numbers"),
        (json.dumps(report().to_dict()).replace("2e-06", '"x"'), "it has no checks with numbers"),
    ],
)
def test_what_is_no_report_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInputError, match=message):
        read_baseline(file)
