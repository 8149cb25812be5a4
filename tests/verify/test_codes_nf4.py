"""The reader of MatMulBnb4 nodes: what it reads, and every way in which it refuses or reports."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vlmexport.errors import ArtifactError
from vlmexport.manifest import Artifact, Manifest, PartFile, QuantizedMember, QuantizedRecord, write_manifest
from vlmexport.quantize.nf4 import quantize_nf4
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.verify.codes import read_codes, unpack_matmul_bnb4, unrecorded_matrices

ROWS, COLUMNS, GROUP = 8, 128, 64
ATTRIBUTES = {"K": COLUMNS, "N": ROWS, "block_size": GROUP, "quant_type": 1}


def quantized() -> QuantizedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return quantize_nf4(weight, make_scheme("nf4", group_size=GROUP))


def packed(tensor: QuantizedTensor) -> np.ndarray:
    """Two codes to a byte by Python integers: slow, obvious, unlike the emitter."""
    codes = tensor.codes.flatten().tolist()
    return np.array([16 * one + other for one, other in zip(codes[::2], codes[1::2], strict=True)], dtype=np.uint8)


def stored() -> dict[str, np.ndarray]:
    return {"w.codes": packed(quantized()), "w.scale": quantized().scale.flatten().numpy()}


def record() -> QuantizedRecord:
    tensor = quantized()
    members = tuple(
        QuantizedMember(name, (start, stop), tensor.rows(start, stop).digest())
        for name, start, stop in (("a", 0, 5), ("b", 5, ROWS))
    )
    return QuantizedRecord("decoder", "w", 4, GROUP, True, COLUMNS, members, codebook="nf4")


def artifact(
    folder: Path,
    arrays: dict[str, np.ndarray],
    attributes: dict[str, int] = ATTRIBUTES,
    records: tuple[QuantizedRecord, ...] | None = None,
    operator: str = "MatMulBnb4",
    cast: bool = False,
) -> Artifact:
    """An export whose decoder is one product with two stacked weights; with `cast`, its scales go through a Cast."""
    nodes = [helper.make_node("Cast", ["w.scale"], ["half"], to=TensorProto.FLOAT16)] if cast else []
    operands = ["x", "w.codes", "half" if cast else "w.scale"]
    nodes.append(helper.make_node(operator, operands, ["y"], domain="com.microsoft", **attributes))
    kind = TensorProto.FLOAT16 if cast else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, ["r", size]) for n, size in (("x", COLUMNS), ("y", ROWS))]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    onnx.save(helper.make_model(graph), folder / "decoder.onnx")
    parts = {"decoder": PartFile("decoder.onnx", (), ())}
    found = (record(),) if records is None else records
    return write_manifest(folder, Manifest("split", "cpu", {}, {}, {}, {}, parts, found, ()))


@pytest.mark.parametrize("cast", [False, True])
def test_codes_scales_and_levels_come_back(tmp_path: Path, cast: bool) -> None:
    made = artifact(tmp_path, stored(), cast=cast)
    tensors, faults = read_codes(made)
    assert faults == []
    assert torch.equal(torch.cat([tensors["a"].dequantize(), tensors["b"].dequantize()]), quantized().dequantize())
    assert unrecorded_matrices(made) == []


@pytest.mark.parametrize(("byte", "weight"), [(0, "a"), (ROWS * COLUMNS // 2 - 1, "b")])
@pytest.mark.parametrize("bit", [0x10, 0x01])
def test_one_corrupt_code_names_its_weight(tmp_path: Path, byte: int, weight: str, bit: int) -> None:
    arrays = stored()
    arrays["w.codes"][byte] ^= bit
    tensors, faults = read_codes(artifact(tmp_path, arrays))
    assert [f.weight for f in faults] == [weight]
    assert "differ from what the quantizer chose" in faults[0].reason
    assert set(tensors) == {"a", "b"}  # the reference runs what the graph holds


def test_one_corrupt_absmax_names_its_weight(tmp_path: Path) -> None:
    arrays = stored()
    arrays["w.scale"][11] = np.nextafter(arrays["w.scale"][11], np.float32(9))
    _, faults = read_codes(artifact(tmp_path, arrays))
    assert [f.weight for f in faults] == ["b"]


@pytest.mark.parametrize(("attribute", "value"), [("quant_type", 0), ("block_size", 32), ("K", 64), ("N", 16)], ids=str)
def test_a_node_that_says_otherwise_is_a_fault_of_every_weight(tmp_path: Path, attribute: str, value: int) -> None:
    _, faults = read_codes(artifact(tmp_path, stored(), {**ATTRIBUTES, attribute: value}))
    assert [f.weight for f in faults] == ["a", "b"]
    assert "the node says" in faults[0].reason


def test_a_node_that_is_not_in_the_manifest_is_reported(tmp_path: Path) -> None:
    other = dataclasses.replace(record(), initializer="other")
    made = artifact(tmp_path, stored(), records=(other,))
    assert [f.weight for f in unrecorded_matrices(made)] == ["w"]
    _, faults = read_codes(made)
    assert {f.reason for f in faults} == {"no MatMulBnb4 node reads other.codes"}


@pytest.mark.parametrize(
    ("codebook", "operator", "reason"),
    [
        ("", "MatMulBnb4", "no MatMulNBits or MatMulIntegerToFloat or DequantizeLinear node reads w.codes"),
        ("nf4", "MatMulNBits", "no MatMulBnb4 node reads w.codes"),
        ("fp4", "MatMulBnb4", "no fp4 node reads w.codes"),
    ],
)
def test_an_operator_of_another_codebook_is_a_fault(tmp_path: Path, codebook: str, operator: str, reason: str) -> None:
    changed = dataclasses.replace(record(), codebook=codebook)
    _, faults = read_codes(artifact(tmp_path, stored(), records=(changed,), operator=operator))
    assert {f.reason for f in faults} == {reason}


def test_swapped_operands_are_a_fault(tmp_path: Path) -> None:
    arrays = stored()
    made = artifact(
        tmp_path, {"w.codes": arrays["w.codes"], "w.scale": arrays["w.scale"], "v.scale": arrays["w.scale"]}
    )
    model = onnx.load(tmp_path / "decoder.onnx")
    model.graph.node[0].input[2] = "v.scale"
    onnx.save(model, tmp_path / "decoder.onnx")
    _, faults = read_codes(made)
    assert "the node reads ['w.codes', 'v.scale'], expected ['w.codes', 'w.scale']" in faults[0].reason


def test_sizes_that_disagree_are_refused() -> None:
    with pytest.raises(ArtifactError, match="255 bytes of codes and 16 scales do not fit 8 x 128"):
        unpack_matmul_bnb4(np.zeros(255, np.uint8), np.zeros(16, np.float32), rows=8, in_features=128, group_size=64)
    with pytest.raises(ArtifactError, match="do not fit 8 x 96"):
        unpack_matmul_bnb4(np.zeros(384, np.uint8), np.zeros(12, np.float32), rows=8, in_features=96, group_size=64)
