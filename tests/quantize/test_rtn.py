import itertools

import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.rtn import quantize_rtn, storable_scale
from vlmexport.quantize.scheme import QuantScheme


def weight(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"), list(itertools.product((2, 3, 4, 8), (True, False), (16, 128, -1)))
)
def test_every_value_is_within_half_a_step_of_its_code(bits: int, symmetric: bool, group: int) -> None:
    w = weight()
    q = quantize_rtn(w, QuantScheme(bits=bits, symmetric=symmetric, group_size=group))
    step = q.scale.float().repeat_interleave(q.group_size, dim=1)
    # Half a step, plus what rounding the scale to float16 moves the end of the range.
    slack = 2**bits * 2**-11
    assert ((q.dequantize() - w).abs() <= step * (0.5 + slack)).all()
    assert int(q.codes.max()) < 2**bits
    assert (q.zero_point is None) == symmetric
    assert (q.scale > 0).all()


def test_symmetric_uses_the_whole_range_for_a_negative_extreme() -> None:
    w = torch.zeros(1, 16)
    w[0, 3] = -8.0
    q = quantize_rtn(w, QuantScheme(group_size=16))
    assert int(q.codes[0, 3]) == 0
    assert q.dequantize()[0, 3] == -8.0


def test_a_group_of_zeros_stays_zero() -> None:
    for symmetric in (True, False):
        q = quantize_rtn(torch.zeros(2, 32), QuantScheme(symmetric=symmetric))
        assert torch.equal(q.dequantize(), torch.zeros(2, 32))


def test_chunks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    whole = quantize_rtn(w, QuantScheme(symmetric=False))
    monkeypatch.setattr("vlmexport.quantize.grid._CHUNK_ELEMENTS", 256 * 5)
    assert quantize_rtn(w, QuantScheme(symmetric=False)).digest() == whole.digest()


def test_bfloat16_and_float32_of_the_same_values_give_the_same_codes() -> None:
    w = weight().bfloat16()
    assert quantize_rtn(w, QuantScheme()).digest() == quantize_rtn(w.float(), QuantScheme()).digest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    w = weight()
    w[3, 5] = bad
    with pytest.raises(BadInputError, match=r"layers\.0\.up\.weight: the weight holds NaN or infinity"):
        quantize_rtn(w, QuantScheme(), "layers.0.up.weight")


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadInputError, match="80 input features are not a multiple of group size 32"):
        quantize_rtn(torch.ones(4, 80), QuantScheme(group_size=32))


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    assert storable_scale(torch.tensor([1.0, 0.0])).dtype == torch.float16
    assert storable_scale(torch.tensor([1.0, 1e-6])).dtype == torch.float32
    assert storable_scale(torch.tensor([1.0, 1e5])).dtype == torch.float32
