"""Codes in ggml's blocks, read without the packer's help."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmexport.errors import ArtifactError
from vlmexport.gguf_options import GgufTensor
from vlmexport.manifest import QuantizedMember, QuantizedRecord
from vlmexport.model.family import Transform
from vlmexport.quantize.ggml import values
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.codes import check_codes, unpack_blocks
from vlmexport.verify.gguf.files import StoredTensor

ROWS, COLUMNS = 8, 96


def codes(bits, zero=False, seed=0):
    rng = np.random.default_rng(seed)
    scale = (rng.integers(1, 128, (ROWS, COLUMNS // 32)) / 1024).astype(np.float16)
    return QuantizedTensor(
        torch.from_numpy(rng.integers(0, 1 << bits, (ROWS, COLUMNS)).astype(np.uint8)),
        torch.from_numpy(scale),
        torch.from_numpy(rng.integers(0, 1 << bits, scale.shape).astype(np.uint8)) if zero else None,
        bits,
        32,
    )


def blocks(tensor, kind):
    """The bytes as the documentation of ggml's blocks says, written here once more."""
    rows = []
    for r in range(ROWS):
        row = b""
        for g in range(COLUMNS // 32):
            part = tensor.codes[r, 32 * g : 32 * g + 32].numpy().astype(int)
            row += tensor.scale[r, g].numpy().tobytes()
            zero = 8 if tensor.zero_point is None else int(tensor.zero_point[r, g])
            if kind == "Q4_1":
                row += np.float16(-zero * float(tensor.scale[r, g])).tobytes()
            if kind == "Q8_0":
                row += bytes((part - 128) % 256 for part in part)
            else:
                row += bytes(part[i] | part[i + 16] << 4 for i in range(16))
        rows.append(np.frombuffer(row, np.uint8))
    return np.stack(rows)


@pytest.mark.parametrize(("kind", "bits", "zero"), [("Q4_0", 4, False), ("Q4_1", 4, True), ("Q8_0", 8, False)])
def test_codes_come_back_as_they_were(kind, bits, zero):
    tensor = codes(bits, zero)
    data = blocks(tensor, kind)
    found = unpack_blocks(data, kind, symmetric=not zero, bits=bits)
    assert found.digest() == tensor.digest()
    stored = StoredTensor("t", (ROWS, COLUMNS), kind, data)
    np.testing.assert_allclose(stored.values(), tensor.dequantize().numpy(), rtol=0, atol=1e-6)


def test_symmetric_codes_may_be_stored_with_minima():
    tensor = codes(4)
    assert unpack_blocks(blocks(tensor, "Q4_1"), "Q4_1", symmetric=True, bits=4).digest() == tensor.digest()
    with pytest.raises(ArtifactError, match="zero points are not the middle"):
        unpack_blocks(blocks(codes(4, zero=True), "Q4_1"), "Q4_1", symmetric=True, bits=4)


def test_what_is_no_codes_of_ours_is_refused():
    with pytest.raises(ArtifactError, match="codes of 8 bits are stored as Q4_0"):
        unpack_blocks(blocks(codes(4), "Q4_0"), "Q4_0", symmetric=True, bits=8)
    with pytest.raises(ArtifactError, match="zero points are stored as Q4_0"):
        unpack_blocks(blocks(codes(4), "Q4_0"), "Q4_0", symmetric=False, bits=4)
    with pytest.raises(ArtifactError, match="codes of 4 bits are stored as Q4_K"):
        unpack_blocks(blocks(codes(4), "Q4_0"), "Q4_K", symmetric=True, bits=4)
    data = blocks(codes(4, zero=True), "Q4_1")
    data[0, 2:4] = np.array([0.3333], np.float16).view(np.uint8)
    with pytest.raises(ArtifactError, match="1 blocks have a minimum that is no whole number of their scale"):
        unpack_blocks(data, "Q4_1", symmetric=False, bits=4)


class Files:
    def __init__(self, tensor):
        self.tensors = {tensor.name: tensor}

    def of(self, _file):
        return self


def judged(data, digest, planned=True):
    stored = StoredTensor("blk.0.attn_q.weight", (ROWS, COLUMNS), "Q4_0", data)
    tensor = GgufTensor(
        stored.name, "text", stored.shape, "Q4_0", "", source="q.weight", transform=Transform("permute", (2,)),
        scheme=QuantScheme(),
    )  # fmt: skip
    record = QuantizedRecord("decoder", stored.name, 4, 32, True, COLUMNS, (QuantizedMember("q", (0, ROWS), digest),))
    gate = Gate()
    check_codes(gate, Files(stored), [tensor] if planned else [], [record])
    return gate.checks[0]


def test_digests_are_of_the_rows_in_the_checkpoints_order():
    tensor = codes(4)
    moved = QuantizedTensor(
        values.apply(tensor.codes, "permute", (2,))[0], values.apply(tensor.scale, "permute", (2,))[0], None, 4, 32
    )
    data = blocks(moved, "Q4_0")
    assert judged(data, tensor.digest()).status == "passed"
    assert judged(data, moved.digest()).status == "failed"
    data[3, 10] ^= 1
    check = judged(data, tensor.digest())
    assert check.status == "failed"
    assert "q.weight: codes, scales or zero points differ" in check.reason
    assert "is recorded and not planned" in judged(data, tensor.digest(), planned=False).reason
