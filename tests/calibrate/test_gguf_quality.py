"""In the real llama.cpp, on pictures: what calibration is worth where weights have outliers."""

from __future__ import annotations

import pytest

from tests.gguf_quality import Export, LlamaJudge, coded
from vlmexport import demo
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.demo.variants import make_outlier_variant
from vlmexport.gguf_options import GgufOptions

pytestmark = pytest.mark.slow

QUESTIONS = 60
FEW = CalibrationOptions(samples=48)
# Accuracy may fall by 1.5 points; of 60 questions none may be lost then.
ACCURACY_LOSS = 0.015


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> LlamaJudge:
    return LlamaJudge(make_outlier_variant(demo.model_dir(), tmp_path_factory.mktemp("model") / "outlier"), QUESTIONS)


def accuracy_stays(judge: LlamaJudge, made: Export) -> bool:
    return made.quality.accuracy >= judge.original().accuracy - ACCURACY_LOSS


def test_codes_by_awq_and_gptq_have_a_fifth_of_the_divergence_of_rounding(judge: LlamaJudge) -> None:
    rounded, made = judge.export(coded("rtn")), judge.export(coded("awq+gptq"), FEW)
    assert made.bits == rounded.bits
    assert made.quality.kl <= 0.2 * rounded.quality.kl
    assert accuracy_stays(judge, made)


def test_q4_k_m_with_our_matrix_keeps_the_accuracy_and_beats_none(judge: LlamaJudge) -> None:
    plain, made = judge.export(GgufOptions(imatrix="none")), judge.export(GgufOptions(), FEW)
    smooth = judge.export(GgufOptions(smooth="awq"), FEW)
    assert made.bits == plain.bits == smooth.bits
    assert made.quality.kl < plain.quality.kl
    assert smooth.quality.kl < 0.5 * plain.quality.kl
    assert accuracy_stays(judge, made)
    assert accuracy_stays(judge, smooth)


def test_the_files_themselves_agree_with_pytorch(judge: LlamaJudge) -> None:
    assert judge.export(GgufOptions("F32", "F32", "none")).quality.kl <= 1e-7
