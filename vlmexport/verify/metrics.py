"""Distances between two tensors or two distributions: pure numpy, float64 inside, no limits and no judgement.

None of them can report a broken output as a small number: `output_fault` names what is wrong with an array, and every
metric returns infinity (or 0 for an agreement) when the value holds NaN or infinity.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
_NO_MEASURE = 1e38
_ROWS_AT_ONCE = 64  # bounds the float64 copies to 64 x vocabulary


def output_fault(reference: Array, value: Array | None) -> str:
    """Why `value` cannot be compared with `reference`, or ``""`` when it can.

    Names a missing, empty, misshapen or non-finite array; dtypes may differ.
    """
    if value is None:
        return "the output is missing"
    if value.shape != reference.shape:
        return f"the output has shape {list(value.shape)}, expected {list(reference.shape)}"
    if value.size == 0:
        return "the output is empty"
    broken = int(value.size - np.count_nonzero(np.isfinite(value.astype(np.float64))))
    if broken:
        return f"{broken} of {value.size} values are NaN or infinite"
    return ""


def max_abs_difference(reference: Array, value: Array) -> float:
    """Largest absolute difference, in the unit of the arrays (any float dtype, same shape); inf when not finite."""
    if reference.size == 0:
        return math.inf
    difference = np.abs(reference.astype(np.float64) - value.astype(np.float64))
    largest = float(difference.max())
    return largest if math.isfinite(largest) else math.inf


def relative_error(reference: Array, value: Array) -> float:
    """Largest absolute difference over the largest absolute reference value; inf when not finite.

    Values near the lowest number of float32, which stand for tokens that a model never writes, are no measure.
    """
    difference = max_abs_difference(reference, value)
    if difference == 0.0 or not math.isfinite(difference):
        return difference
    magnitudes = np.abs(reference.astype(np.float64))
    scale = float(magnitudes.max(initial=0.0, where=magnitudes < _NO_MEASURE))
    return difference / scale if scale > 0.0 else math.inf


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Natural log of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_per_token(reference: Array, value: Array) -> NDArray[np.float64]:
    """``KL(softmax(reference) || softmax(value))`` in nats for each row of logits ``[tokens, vocab]``.

    A row where `value` or `reference` is not finite has a divergence of inf. Rounding may leave a value that is
    negative by less than 1e-12; it is returned as 0.
    """
    result = np.empty(reference.shape[0], dtype=np.float64)
    for start in range(0, reference.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        with np.errstate(invalid="ignore"):
            expected, found = log_softmax(reference[rows]), log_softmax(value[rows])
            result[rows] = (np.exp(expected) * (expected - found)).sum(axis=-1)
    result[~np.isfinite(result)] = math.inf
    return np.maximum(result, 0.0)


def mean_kl(reference: Array, value: Array) -> float:
    """Mean of `kl_per_token` in nats per token; inf when there is no token."""
    return float(kl_per_token(reference, value).mean()) if reference.shape[0] else math.inf


def top1_agreement(reference: Array, value: Array) -> float:
    """Share of rows of logits ``[tokens, vocab]`` with the same largest entry; non-finite rows never agree."""
    if not reference.shape[0]:
        return 0.0
    finite = np.isfinite(value.astype(np.float64)).all(axis=-1)
    return float(np.mean((reference.argmax(axis=-1) == value.argmax(axis=-1)) & finite))


def token_nll(logits: Array, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood in nats of ``token_ids`` ``[tokens]`` under ``logits`` ``[tokens, vocab]``."""
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = -np.take_along_axis(log_softmax(logits), token_ids[:, None], axis=-1)[:, 0]
    found[~np.isfinite(found)] = math.inf
    return found


def perplexity_ratio(reference_nll: NDArray[np.float64], value_nll: NDArray[np.float64]) -> float:
    """Perplexity under the value over perplexity under the reference, from per-token nats; inf when not finite."""
    if not reference_nll.size:
        return math.inf
    difference = float(value_nll.mean() - reference_nll.mean())
    return math.exp(min(difference, 700.0)) if math.isfinite(difference) else math.inf
