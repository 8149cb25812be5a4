import dataclasses

import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor, stack_rows


def quantized(rows: int = 6, **scheme: object) -> QuantizedTensor:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    return quantize_rtn(weight, QuantScheme(**scheme))  # type: ignore[arg-type]


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    q = QuantizedTensor(
        codes=torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        zero_point=torch.tensor([[1, 8]], dtype=torch.uint8),
        bits=4,
        group_size=2,
    )
    assert q.dequantize().tolist() == [[-0.5, 7.0, 0.0, 2.0]]


@pytest.mark.parametrize("what", ["codes", "scale", "zero_point"])
def test_the_digest_changes_with_every_field(what: str) -> None:
    q = quantized(symmetric=False)
    changed = getattr(q, what).clone()
    changed[0, 0] += 1
    assert dataclasses.replace(q, **{what: changed}).digest() != q.digest()


def test_stacked_rows_dequantize_like_their_parts() -> None:
    parts = [quantized(6), quantized(3)]
    assert torch.equal(stack_rows(parts).dequantize(), torch.cat([p.dequantize() for p in parts]))


def test_different_schemes_do_not_stack() -> None:
    with pytest.raises(BadInputError, match="cannot stack"):
        stack_rows([quantized(bits=4), quantized(bits=8)])
    with pytest.raises(BadInputError, match="cannot stack"):
        stack_rows([quantized(symmetric=True), quantized(symmetric=False)])


def test_smaller_groups_are_the_same_weight() -> None:
    q = quantized(group_size=64, symmetric=False)
    small = q.regrouped(16)
    assert small.group_size == 16
    assert small.scale.shape == (6, 4)
    assert torch.equal(small.dequantize(), q.dequantize())
    with pytest.raises(BadInputError, match="groups of 64 cannot be cut into groups of 48"):
        q.regrouped(48)


def test_rows_are_a_part_of_the_weight() -> None:
    for symmetric in (True, False):
        q = quantized(symmetric=symmetric)
        assert torch.equal(q.rows(2, 5).dequantize(), q.dequantize()[2:5])


def test_a_codebook_gives_the_levels() -> None:
    levels = torch.tensor([-1.0, -0.25, 0.0, 2.0])
    codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
    q = QuantizedTensor(codes, torch.tensor([[0.5, 2.0]]), None, bits=2, group_size=2, codebook=levels)
    assert q.dequantize().tolist() == [[-0.5, 1.0, -0.5, 0.0]]
    assert q.rows(0, 1).digest() == q.digest()
    assert torch.equal(stack_rows([q, q]).dequantize(), q.dequantize().repeat(2, 1))
    other = dataclasses.replace(q, codebook=levels + 1)
    assert other.digest() != q.digest()
    with pytest.raises(BadInputError, match="cannot stack"):
        stack_rows([q, other])
