import pytest
import torch

from tests.quantize.data import inputs, statistics_of, weight
from vlmexport.quantize.calibrated import quantize_calibrated
from vlmexport.quantize.gptq import Factor, factorize, round_gptq
from vlmexport.quantize.rtn import quantize_rtn, rtn_grid
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputStatistics


def shrunk(moment: torch.Tensor, tokens: int) -> torch.Tensor:
    """OAS shrinkage (Chen et al. 2010) on the correlation of the features, in float64."""
    root = moment.diagonal().sqrt()
    correlation, p = moment / root / root[:, None], len(root)
    squares, trace = float((correlation @ correlation).trace()), float(correlation.trace())
    share = ((1 - 2 / p) * squares + trace**2) / ((tokens + 1 - 2 / p) * (squares - trace**2 / p))
    assert share < 1
    return (1 - share) * moment + share * torch.diag(moment.diagonal())


def papers_codes(
    w: torch.Tensor, moment: torch.Tensor, scheme: QuantScheme, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ as arXiv 2210.17323 writes it (inverse Hessian, its Cholesky factor), column by column in float64.

    Returns the codes and how far each was from a tie, in steps.
    """
    grid = rtn_grid(w, scheme)
    scale = grid.scale.double().repeat_interleave(grid.group_size, dim=1)
    zero = grid.zero_point.double().repeat_interleave(grid.group_size, dim=1)
    order = torch.argsort(moment.diagonal(), stable=True).flip(0)
    hessian = shrunk(moment.double(), tokens)[order][:, order]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, codes, margin = w.double()[:, order].clone(), torch.zeros(w.shape).double(), torch.zeros(w.shape).double()
    for i, column in enumerate(order.tolist()):
        steps = left[:, i] / scale[:, column]
        code = (steps.round() + zero[:, column]).clamp(0, 2**scheme.bits - 1)
        margin[:, column] = 0.5 - (steps - steps.round()).abs()
        codes[:, column] = code
        error = (left[:, i] - (code - zero[:, column]) * scale[:, column]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    return codes.to(torch.uint8), margin


@pytest.mark.parametrize("scheme", [
    QuantScheme(algorithm="gptq"),
    QuantScheme(algorithm="gptq", bits=3, symmetric=False, group_size=16),
    QuantScheme(algorithm="gptq", bits=8, group_size=-1),
])  # fmt: skip
def test_codes_are_those_of_the_papers_algorithm(scheme: QuantScheme) -> None:
    w, moment = weight(16, 192), statistics_of(inputs(600, 192)).moment
    expected, margin = papers_codes(w, moment, scheme, 600)
    # float32 and float64 may part only where the reference is next to a tie; what follows in that row then differs too.
    clear = (margin > 1e-4).all(1)
    assert int(clear.sum()) >= 12
    made, _ = quantize_calibrated(w, statistics_of(inputs(600, 192)), scheme)
    assert torch.equal(made.codes[clear], expected[clear])


def factor_of(statistics: InputStatistics) -> Factor:
    factor = factorize(statistics)
    assert isinstance(factor, Factor)
    return factor


def test_the_reported_error_is_the_output_error() -> None:
    w, statistics = weight(), statistics_of(inputs())
    scheme = QuantScheme(symmetric=False)
    grid = rtn_grid(w, scheme)
    codes, error = round_gptq(w, grid, factor_of(statistics))
    difference = (grid.quantized(codes).dequantize() - w).double()
    assert error == pytest.approx(float((difference @ statistics.moment.double() * difference).sum()), rel=1e-3)


def test_silent_features_are_rounded_to_nearest_and_counted() -> None:
    x = inputs()
    x[:, [3, 40, 41]] = 0
    w, scheme = weight(), QuantScheme(algorithm="gptq")
    made, report = quantize_calibrated(w, statistics_of(x), scheme)
    assert report.dead_columns == 3
    assert torch.equal(made.codes[:, [3, 40, 41]], quantize_rtn(w, scheme).codes[:, [3, 40, 41]])


def test_inputs_that_are_all_silent_round_to_nearest() -> None:
    w, scheme = weight(), QuantScheme(algorithm="gptq")
    made, report = quantize_calibrated(w, statistics_of(torch.zeros(256, 256)), scheme)
    assert made.digest() == quantize_rtn(w, scheme).digest()
    assert (report.error, report.dead_columns) == (0.0, 256)


def indefinite(smallest: float) -> InputStatistics:
    """A moment of unit diagonal whose smallest eigenvalue is `smallest` (rounding makes such moments, less extreme)."""
    moment = torch.eye(32)
    moment[0, 1] = moment[1, 0] = 1 - smallest
    return InputStatistics(moment, torch.ones(32), torch.ones(32), tokens=10**9)


@pytest.mark.parametrize(("smallest", "damping"), [(0.5, 0.01), (-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_grows_until_the_moment_can_be_factorised(smallest: float, damping: float) -> None:
    assert factor_of(indefinite(smallest)).damping == damping


@pytest.mark.parametrize(("statistics", "reason"), [
    (indefinite(-2.0), "cannot be factorised, not even with damping 1.0"),
    (statistics_of(inputs(1, 32)), "1 calibration tokens are too few for 32 input features"),
    (InputStatistics.empty(32), "0 calibration tokens are too few"),
    (statistics_of(torch.full((64, 32), float("nan"))), "not finite"),
    (statistics_of(torch.full((64, 32), 1e30)), "not finite"),
])  # fmt: skip
def test_what_cannot_be_factorised_falls_back_and_says_so(statistics: InputStatistics, reason: str) -> None:
    w, scheme = weight(8, 32), QuantScheme(algorithm="gptq")
    made, report = quantize_calibrated(w, statistics, scheme)
    assert reason in report.fallback
    assert made.digest() == quantize_rtn(w, scheme).digest()


@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
def test_few_tokens_do_no_harm_on_others(tokens: int) -> None:
    w, scheme = weight(), QuantScheme(algorithm="gptq", symmetric=False)
    x = torch.randn(tokens + 4096, 256, generator=torch.Generator().manual_seed(7))
    x += x.roll(1, dims=1) * 0.3
    seen, other = statistics_of(x[:tokens]), x[tokens:]
    made, report = quantize_calibrated(w, seen, scheme)

    def error(dequantized: torch.Tensor) -> float:
        return float((other @ (dequantized - w).t()).square().sum())

    assert report.fallback == ""
    assert error(made.dequantize()) < error(quantize_rtn(w, scheme).dequantize()) * 1.02


def test_more_tokens_shrink_less() -> None:
    x = inputs(4096)
    shares = [factor_of(statistics_of(x[:count])).shrinkage for count in (32, 256, 4096)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    # Independent features have no correlation but by chance: all of it that may go, goes.
    assert factor_of(statistics_of(torch.randn(512, 256, generator=torch.Generator().manual_seed(1)))).shrinkage > 0.9


def test_the_factor_leaves_the_statistics_alone() -> None:
    statistics = statistics_of(inputs())
    before = statistics.moment.clone()
    factor_of(statistics)
    assert torch.equal(statistics.moment, before)
