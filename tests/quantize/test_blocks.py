import pytest

from vlmexport.errors import BadInputError
from vlmexport.quantize.blocks import block_size


def test_one_group_per_row_becomes_the_widest_block_that_divides() -> None:
    assert block_size(576, -1) == 64
    assert block_size(4096, -1) == 256
    assert block_size(4096, 128) == 128
    with pytest.raises(BadInputError, match="72 input features"):
        block_size(72, -1)
