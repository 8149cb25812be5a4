"""What the methods keep of a trained model whose outliers naive rounding cannot take (issue 3's bars)."""

from __future__ import annotations

import pytest

from tests.quality import Judge, Quality
from vlmexport import demo
from vlmexport.demo.variants import make_outlier_variant
from vlmexport.quantize.scheme import QuantScheme

pytestmark = pytest.mark.slow
QUESTIONS = 325


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quality]:
    """Every method at equal size: 4 bits, symmetric, groups of 128."""
    variant = make_outlier_variant(demo.model_dir(), tmp_path_factory.mktemp("outlier") / "model")
    judge = Judge(variant, QUESTIONS)
    made = {m: judge.judge(judge.weights(QuantScheme(4, True, 128, m))) for m in ("rtn", "awq", "gptq", "awq+gptq")}
    return {"original": judge.original(), **made}


@pytest.mark.parametrize(("method", "points"), [("awq", 1.0), ("awq+gptq", 1.0), ("gptq", 4.0)])
def test_calibrated_methods_keep_the_accuracy(judged: dict[str, Quality], method: str, points: float) -> None:
    assert 100 * (judged["original"].accuracy - judged[method].accuracy) < points


def test_round_to_nearest_does_not(judged: dict[str, Quality]) -> None:
    assert 100 * (judged["original"].accuracy - judged["rtn"].accuracy) > 5


def test_both_together_are_at_least_as_good_as_each(judged: dict[str, Quality]) -> None:
    both = judged["awq+gptq"].kl
    assert both <= 1.15 * min(judged["awq"].kl, judged["gptq"].kl)
    assert both <= 0.05 * judged["rtn"].kl
