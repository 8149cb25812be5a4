"""Choosing the next token from logits: greedy, temperature, top-k, top-p. Pure functions on numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and when it ends.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep all tokens. `seed` makes a drawn answer repeatable.
    `stop`: the answer ends before the first of these texts. `max_new_tokens`: the longest answer in tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, good in (
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("max_new_tokens", self.max_new_tokens >= 1),
        ):
            if not good:
                raise BadInputError(f"{name} {getattr(self, name)} is out of range")

    def generator(self) -> np.random.Generator:
        """A fresh random generator from `seed`."""
        return np.random.default_rng(self.seed)


def choose(logits: NDArray[Any], sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token id from one row of logits ``[vocab]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(generator.choice(len(logits), p=probabilities(logits, sampling)))


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities ``[vocab]`` after temperature, then top-k, then top-p (the order of transformers)."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        limit = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled = np.where(scaled < limit, -np.inf, scaled)
    weights: NDArray[np.float64] = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    return _nucleus(weights, sampling.top_p) if sampling.top_p < 1 else weights


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Keep the likeliest tokens until their total reaches `top_p`; always at least one."""
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    kept = np.zeros_like(weights)
    chosen = order[before < top_p]
    kept[chosen] = weights[chosen]
    result: NDArray[np.float64] = kept / kept.sum()
    return result
