import torch

from tests.quantize.data import inputs, statistics_of
from vlmexport.quantize.statistics import InputStatistics


def same(one: InputStatistics, other: InputStatistics) -> None:
    torch.testing.assert_close(one.moment, other.moment, rtol=1e-5, atol=1e-6 * float(one.moment.max()))
    torch.testing.assert_close(one.absolute, other.absolute, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.maximum, other.maximum)
    assert one.tokens == other.tokens


def test_tokens_in_parts_are_tokens_at_once() -> None:
    x = inputs()
    parts = InputStatistics.empty(256)
    for part in (x[:100], x[100:100], x[100:]):
        parts.add(part)
    same(parts, statistics_of(x))


def test_the_sums_are_what_they_say() -> None:
    x = inputs(50, 32)
    statistics = statistics_of(x)
    torch.testing.assert_close(statistics.moment, sum(t.outer(t) for t in x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.mean_absolute(), x.abs().mean(0))
    assert torch.equal(statistics.maximum, x.abs().amax(0))


def test_scaled_statistics_are_those_of_scaled_inputs() -> None:
    x, factor = inputs(), torch.linspace(0.25, 4, 256)
    same(statistics_of(x).scaled(factor), statistics_of(x * factor))


def test_no_tokens_have_no_mean() -> None:
    assert not InputStatistics.empty(8).mean_absolute().any()


def test_half_precision_inputs_are_summed_in_float32() -> None:
    statistics = statistics_of(torch.full((70000, 2), 2.0, dtype=torch.float16))
    assert statistics.moment[0, 1] == 280000.0
