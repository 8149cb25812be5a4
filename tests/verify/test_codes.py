"""The unpacker against hand-packed bytes, and against graphs that onnxruntime itself multiplies with."""

import numpy as np
import pytest
import torch

from vlmexport.errors import ArtifactError
from vlmexport.verify.codes import unpack_low_first, unpack_matmul_nbits


def test_low_bits_come_first():
    packed = np.array([[0x21, 0x43]], dtype=np.uint8)
    assert unpack_low_first(packed, 4).tolist() == [[1, 2, 3, 4]]
    assert unpack_low_first(np.array([[0b11100100]], dtype=np.uint8), 2).tolist() == [[0, 1, 2, 3]]
    assert unpack_low_first(packed, 8).tolist() == packed.tolist()


def test_three_bits_are_refused():
    with pytest.raises(ArtifactError, match="3 bits"):
        unpack_low_first(np.zeros((1, 3), dtype=np.uint8), 3)


def pack(values, bits):
    """Little-endian bit packing of each row by Python integers: slow, obvious, unlike the reader."""
    rows = []
    for row in values:
        number = sum(int(v) << (bits * i) for i, v in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 8), "little"), dtype=np.uint8))
    return np.stack(rows)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("in_features", [48, 40, 16])
def test_codes_and_zero_points_come_back(bits, symmetric, in_features):
    rng = np.random.default_rng(bits)
    rows, group = 5, 16
    groups = -(-in_features // group)
    codes = rng.integers(0, 1 << bits, (rows, groups * group), dtype=np.uint8)
    scale = rng.uniform(0.1, 1.0, (rows, groups)).astype(np.float16)
    zero = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
    tensor = unpack_matmul_nbits(
        pack(codes, bits).reshape(rows, groups, -1),
        scale.astype(np.float32),
        None if symmetric else pack(zero, bits).reshape(-1),
        bits=bits,
        group_size=group,
        in_features=in_features,
    )
    assert np.array_equal(tensor.codes.numpy(), codes[:, :in_features])
    assert np.array_equal(tensor.scale.numpy(), scale.astype(np.float32))
    middle = np.full_like(zero, 1 << (bits - 1))
    expected = codes.astype(np.float32) - np.repeat(middle if symmetric else zero, group, axis=1)
    expected *= np.repeat(scale.astype(np.float32), group, axis=1)
    assert torch.equal(tensor.dequantize(), torch.from_numpy(expected[:, :in_features]))
    if symmetric:
        assert tensor.zero_point is None
    else:
        assert np.array_equal(tensor.zero_point.numpy(), zero)


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ArtifactError, match="do not fit"):
        unpack_matmul_nbits(
            np.zeros((4, 2, 8), dtype=np.uint8),
            np.zeros((4, 3), dtype=np.float32),
            None,
            bits=4,
            group_size=16,
            in_features=32,
        )
