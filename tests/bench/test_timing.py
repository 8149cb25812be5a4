from __future__ import annotations

import pytest

from vlmexport.bench.timing import Round, percentile, summarise


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_nearest_rank_percentile(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_percentile_of_one_value() -> None:
    assert percentile([7.0], 0.99) == 7.0


def test_summary_takes_medians_of_rounds_and_percentiles_of_tokens() -> None:
    rounds = [
        Round(100, 10.0, 50.0, (2.0, 2.0)),
        Round(100, 20.0, 100.0, (4.0, 4.0)),
        Round(100, 90.0, 1000.0, (100.0, 100.0)),
    ]
    assert summarise(rounds) == {
        "ttft_ms": 120.0,
        "prefill_tok_s": 1000.0,
        "decode_tok_s": 250.0,
        "p50_ms": 4.0,
        "p95_ms": 100.0,
        "p99_ms": 100.0,
    }


def test_a_round_survives_json() -> None:
    one = Round(3, 1.0, 2.0, (3.0,))
    assert Round.from_dict(one.to_dict()) == one
