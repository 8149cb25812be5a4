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
