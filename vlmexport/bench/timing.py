"""What one measured round is, and how rounds become numbers: medians over rounds, percentiles over decode tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from vlmexport.runtime.generate import generate_ids
from vlmexport.runtime.protocol import ModelInputs, Runner
from vlmexport.runtime.sampling import Sampling


@dataclass(frozen=True)
class Round:
    """One answer of fixed length, in milliseconds: image encoding, prefill, and every decode step."""

    prompt_tokens: int
    image_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The round as JSON data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Round:
        """Read `to_dict`'s data back."""
        return Round(data["prompt_tokens"], data["image_ms"], data["prefill_ms"], tuple(data["decode_ms"]))


def measure_round(runner: Runner, inputs: ModelInputs, tokens: int) -> Round:
    """Answer `inputs` greedily with exactly `tokens` decode steps, whatever the model says."""
    timings = generate_ids(runner, [inputs], Sampling(max_new_tokens=tokens + 1), end_tokens=()).timings
    prompt = int(inputs.input_ids.shape[1])
    return Round(prompt, timings.image_ms, timings.prefill_ms, tuple(timings.decode_ms))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * round(share * 1000) // 1000))
    return ordered[rank - 1]


def summarise(rounds: Sequence[Round]) -> dict[str, float]:
    """The speed keys of a bench result.

    ``ttft_ms`` (image, prefill, without loading), ``prefill_tok_s`` and ``decode_tok_s`` are medians over rounds;
    ``p50_ms``, ``p95_ms`` and ``p99_ms`` are over the decode tokens of all rounds.
    """
    steps = [ms for r in rounds for ms in r.decode_ms]
    return {
        "ttft_ms": median(r.image_ms + r.prefill_ms for r in rounds),
        "prefill_tok_s": median(1000 * r.prompt_tokens / r.prefill_ms for r in rounds),
        "decode_tok_s": median(1000 * len(r.decode_ms) / sum(r.decode_ms) for r in rounds),
        "p50_ms": percentile(steps, 0.50),
        "p95_ms": percentile(steps, 0.95),
        "p99_ms": percentile(steps, 0.99),
    }
