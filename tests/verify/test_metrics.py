"""The distances, against hand-made values; a broken output is never a small number."""

import math

import numpy as np
import pytest

from vlmexport.verify import metrics


def test_relative_error_is_over_the_largest_reference_value():
    reference = np.array([[1.0, -4.0]], dtype=np.float32)
    value = np.array([[1.5, -4.0]], dtype=np.float32)
    assert metrics.max_abs_difference(reference, value) == 0.5
    assert metrics.relative_error(reference, value) == 0.125


def test_relative_error_of_equal_zeros_is_zero_and_of_a_change_from_zero_is_infinite():
    zeros = np.zeros((2, 2), dtype=np.float32)
    assert metrics.relative_error(zeros, zeros) == 0.0
    assert metrics.relative_error(zeros, zeros + 1) == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_infinitely_far(bad):
    reference = np.array([[0.0, 1.0, 2.0]], dtype=np.float32)
    value = reference.copy()
    value[0, 1] = bad
    assert metrics.max_abs_difference(reference, value) == math.inf
    assert metrics.relative_error(reference, value) == math.inf
    assert metrics.top1_agreement(reference, value) == 0.0
    if bad != -np.inf:
        assert metrics.mean_kl(reference, value) == math.inf
    assert "NaN or infinite" in metrics.output_fault(reference, value)


def test_a_forbidden_token_that_the_reference_allows_has_infinite_divergence():
    reference, value = np.array([[0.0, 1.0]]), np.array([[0.0, -np.inf]])
    assert metrics.mean_kl(reference, value) == math.inf


def test_no_tokens_is_not_perfect():
    empty = np.zeros((0, 4), dtype=np.float32)
    assert metrics.mean_kl(empty, empty) == math.inf
    assert metrics.top1_agreement(empty, empty) == 0.0
    assert metrics.perplexity_ratio(np.zeros(0), np.zeros(0)) == math.inf


def test_kl_of_known_distributions():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    expected = float((p * np.log(p / q)).sum())
    assert metrics.mean_kl(np.log(p)[None], np.log(q)[None] + 3.0) == pytest.approx(expected)


def test_kl_is_the_same_in_blocks():
    rng = np.random.default_rng(0)
    reference, value = rng.normal(size=(150, 7)), rng.normal(size=(150, 7))
    rows = [metrics.mean_kl(reference[i : i + 1], value[i : i + 1]) for i in range(150)]
    assert metrics.mean_kl(reference, value) == pytest.approx(np.mean(rows))


def test_top1_counts_equal_argmax():
    reference = np.array([[0.0, 1.0], [1.0, 0.0]])
    value = np.array([[0.0, 1.0], [0.0, 1.0]])
    assert metrics.top1_agreement(reference, value) == 0.5


def test_perplexity_ratio_of_known_likelihoods():
    logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))
    nll = metrics.token_nll(logits, np.array([1, 0]))
    assert nll == pytest.approx([-math.log(0.75), -math.log(0.5)])
    assert metrics.perplexity_ratio(nll, nll + math.log(2)) == pytest.approx(2.0)


def test_output_faults_are_named():
    reference = np.zeros((2, 3))
    assert "missing" in metrics.output_fault(reference, None)
    assert "[3, 2]" in metrics.output_fault(reference, np.zeros((3, 2)))
    assert "empty" in metrics.output_fault(np.zeros((0, 3)), np.zeros((0, 3)))
    assert metrics.output_fault(reference, np.ones((2, 3), dtype=np.float16)) == ""
