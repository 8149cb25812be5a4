import pytest
import torch

from tests.quantize.data import inputs, statistics_of, weight
from vlmexport.quantize.awq import awq_scale, output_error
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme

SCHEME = QuantScheme(symmetric=False, algorithm="awq")


def error(w: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor) -> float:
    return output_error(quantize_rtn(w * scale, SCHEME).dequantize() / scale - w, moment)


def found(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    scale = awq_scale([w], statistics_of(x), [SCHEME])
    assert scale is not None
    return scale


def test_the_scale_lowers_the_output_error_of_all_rows() -> None:
    w, x = weight(700), inputs()
    scale = found(w, x)
    assert (scale > 0).all()
    assert scale.dtype == torch.float32
    moment = statistics_of(x).moment
    assert error(w, scale, moment) < 0.8 * error(w, torch.ones(256), moment)


@pytest.mark.parametrize("exponent", [-4.0, 4.0])
def test_a_scale_planted_between_input_and_weight_is_undone(exponent: float) -> None:
    w, x = weight(), inputs()
    planted = torch.ones(256)
    planted[5::20] = 2.0**exponent
    moment = statistics_of(x).moment
    clean = min(error(w, found(w, x), moment), error(w, torch.ones(256), moment))
    spoilt, spoilt_x = w * planted, x / planted
    spoilt_moment = statistics_of(spoilt_x).moment
    before = error(spoilt, torch.ones(256), spoilt_moment)
    after = error(spoilt, found(spoilt, spoilt_x), spoilt_moment)
    assert after < 1.2 * clean
    assert after < 0.4 * before


def test_none_when_nothing_is_gained() -> None:
    # Every weight is on the grid already: no error to lower.
    w = quantize_rtn(weight(), SCHEME).dequantize()
    grid_point = quantize_rtn(w, SCHEME).dequantize()
    assert torch.equal(w, grid_point)
    assert awq_scale([w], statistics_of(inputs()), [SCHEME]) is None
    assert awq_scale([weight()], statistics_of(torch.zeros(4, 256)), [SCHEME]) is None


def test_silent_features_keep_their_scale() -> None:
    x = inputs()
    x[:, [3, 40]] = 0
    assert found(weight(), x)[[3, 40]].tolist() == [1.0, 1.0]


def test_all_readers_of_an_input_count() -> None:
    # What suits one weight alone differs from what suits it together with a much larger one.
    w, x = weight(), inputs()
    loud = weight(seed=5) * 50 * torch.where(torch.arange(256) % 20 == 5, 16.0, 1.0)
    together = awq_scale([w, loud], statistics_of(x), [SCHEME, SCHEME])
    assert together is not None
    assert not torch.equal(together, found(w, x))


def test_output_error_is_the_trace() -> None:
    e, moment = weight(3, 16), statistics_of(inputs(40, 16)).moment
    assert output_error(e, moment) == pytest.approx(float(torch.trace(e @ moment @ e.t())), rel=1e-5)
    diagonal = moment.diagonal()
    assert output_error(e, diagonal) == pytest.approx(float(torch.trace(e @ diagonal.diag() @ e.t())), rel=1e-5)
