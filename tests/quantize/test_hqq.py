import itertools

import pytest
import torch

from tests.quantize.data import weight
from vlmexport.errors import BadInputError
from vlmexport.quantize.hqq import quantize_hqq
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme


@pytest.mark.parametrize(("bits", "group"), list(itertools.product((2, 3, 4, 8), (16, 128, -1))))
def test_no_group_is_worse_than_rounding_to_nearest(bits: int, group: int) -> None:
    w, scheme = weight() ** 3, QuantScheme(algorithm="hqq", bits=bits, symmetric=False, group_size=group)
    ours, plain = quantize_hqq(w, scheme), quantize_rtn(w, scheme)

    def errors(dequantized: torch.Tensor) -> torch.Tensor:
        return (dequantized - w).abs().pow(0.7).reshape(24, -1, ours.group_size).sum(-1)

    assert (errors(ours.dequantize()) <= errors(plain.dequantize()) * (1 + 1e-5)).all()
    assert errors(ours.dequantize()).sum() < errors(plain.dequantize()).sum()


def test_the_squared_error_of_heavy_tails_falls_too() -> None:
    w, scheme = weight() ** 3, QuantScheme(algorithm="hqq", bits=3, symmetric=False)
    ours, plain = (f(w, scheme).dequantize() for f in (quantize_hqq, quantize_rtn))
    assert (ours - w).square().sum() < (plain - w).square().sum()


def test_zeros_stay_zero() -> None:
    w = weight()
    w[3], w[:, 32:64] = 0, 0
    made = quantize_hqq(w, QuantScheme(algorithm="hqq", symmetric=False)).dequantize()
    assert not made[3].any()
    assert not made[:, 32:64].any()


def test_nan_is_refused() -> None:
    with pytest.raises(BadInputError, match="NaN or infinity"):
        quantize_hqq(torch.full((2, 32), float("nan")), QuantScheme(algorithm="hqq", symmetric=False))
