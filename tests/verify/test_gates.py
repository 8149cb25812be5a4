"""Where a value meets its limit: what passes, what fails, and what is never counted as passed."""

import math

import numpy as np
import pytest

from vlmexport.errors import BadInputError
from vlmexport.verify.gates import Gate, NotRunError
from vlmexport.verify.result import Check, ParityReport


def only(gate):
    (check,) = gate.checks
    return check


def test_a_value_at_its_limit_passes_and_above_fails():
    gate = Gate()
    gate.at_most("a", "decoder", "lowering", 1e-5, 1e-5)
    gate.at_most("b", "decoder", "lowering", 1.1e-5, 1e-5)
    gate.at_least("c", "decoder", "lowering", 0.97, 0.97, "share")
    gate.at_least("d", "decoder", "lowering", 0.96, 0.97, "share")
    assert [c.status for c in gate.checks] == ["passed", "failed", "passed", "failed"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_passes(value):
    gate = Gate()
    gate.at_most("a", "decoder", "lowering", value, math.inf)
    gate.at_least("b", "decoder", "lowering", value, 0.0, "share")
    assert [c.status for c in gate.checks] == ["failed", "failed"]
    assert gate.checks[0].to_dict()["value"] is None


def test_close_names_the_fault_of_an_array():
    gate = Gate()
    reference = np.ones((1, 2), dtype=np.float32)
    assert gate.close("a", "projector", "lowering", reference, reference * np.nan, 1.0) == math.inf
    assert only(gate).status == "failed"
    assert "NaN" in only(gate).reason


def test_guard_turns_a_runtime_error_into_a_failed_check_of_the_part():
    gate = Gate()
    with gate.guard("prefill", "decoder", "lowering"):
        raise BadInputError("no output logits")
    assert only(gate).status == "failed"
    assert only(gate).part == "decoder"
    assert "no output logits" in only(gate).reason


def test_guard_lets_programming_errors_through():
    gate = Gate()
    with pytest.raises(AttributeError), gate.guard("prefill", "decoder", "lowering"):
        None.missing  # noqa: B018


def test_guard_records_what_could_not_run():
    gate = Gate()
    with gate.guard("prefill", "decoder", "lowering"):
        raise NotRunError("needs CUDA")
    assert only(gate).status == "not_run"


def check(status, question="lowering"):
    return Check(f"{status}-{question}", "decoder", question, status, "rel <=", 0.0, 1.0)


def test_overall_status():
    assert ParityReport((check("passed"),)).status == "passed"
    assert ParityReport((check("passed"), check("not_run"))).status == "incomplete"
    assert ParityReport((check("failed"), check("not_run"))).status == "failed"
    assert ParityReport(()).status == "incomplete"


def test_the_two_questions_have_their_own_status():
    report = ParityReport((check("passed"), check("failed", "quantization")))
    data = report.to_dict()
    assert (data["lowering"]["status"], data["quantization"]["status"]) == ("passed", "failed")


def test_json_has_the_documented_keys():
    data = ParityReport((check("passed"),)).to_dict()
    assert set(data) == {"status", "lowering", "quantization", "checks", "runtime", "details"}
    assert set(data["lowering"]) == {"status", "max_abs_logit", "kl", "top1"}
    quantization = {"status", "kl", "top1", "perplexity_ratio", "accuracy", "reference_accuracy"}
    assert set(data["quantization"]) == quantization
    assert set(data["checks"][0]) == {"name", "part", "status", "metric", "value", "limit"}
