from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlmexport.errors import BadInputError
from vlmexport.runtime.sampling import Sampling, choose, probabilities

LOGITS = np.random.default_rng(0).normal(size=50).astype(np.float32) * 3


def test_greedy_is_the_largest() -> None:
    assert choose(LOGITS, Sampling(), np.random.default_rng(0)) == LOGITS.argmax()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.9, 8, 0.5)]
)
def test_probabilities_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(LOGITS)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = probabilities(LOGITS, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), atol=1e-6)


def test_seed_repeats_and_differs() -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator()
        return [choose(LOGITS, sampling, generator) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_tiny_top_p_keeps_one() -> None:
    weights = probabilities(LOGITS, Sampling(temperature=1.0, top_p=1e-9))
    assert np.count_nonzero(weights) == 1


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_out_of_range_is_named(values: dict[str, float]) -> None:
    with pytest.raises(BadInputError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
