"""Words are checked against Python integers: code `i` is in bits `i * width` of its row."""

import pytest
import torch

from vlmexport.lower.checkpoint.bits import pack_words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 45, 96])
def test_every_code_is_where_it_should_be(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_words(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, -(-columns * bits // 32))
    for row in range(3):
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed[row].tolist()))
        assert [(number >> (i * bits)) & ((1 << bits) - 1) for i in range(columns)] == codes[row].tolist()
        assert number >> (columns * bits) == 0
