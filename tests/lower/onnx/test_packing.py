"""MatMulNBits against the product with the dequantized codes, in ONNX Runtime."""

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from vlmexport.lower.onnx.packing import pack_bits, pack_matmul_nbits
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

CASES = list(itertools.product((2, 4, 8), (True, False), (16, 32, 128, -1)))


def run_product(x: np.ndarray, q: QuantizedTensor, level: int) -> np.ndarray:
    packed = pack_matmul_nbits(q, x.dtype.type)
    arrays = {"codes": packed.codes, "scale": packed.scale, "zero": packed.zero_point}
    kind = ir.DataType.from_numpy(x.dtype)
    inputs = [ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["rows", q.shape[1]]))]
    held = [
        None
        if a is None
        else ir.Value(name=n, const_value=ir.Tensor(a, name=n), type=ir.TensorType(ir.Tensor(a).dtype))
        for n, a in arrays.items()
    ]
    attributes = {"K": q.shape[1], "N": q.shape[0], "bits": q.bits, "block_size": packed.block_size}
    node = ir.node(
        "MatMulNBits", [*inputs, *held], {**attributes, "accuracy_level": level}, domain="com.microsoft", num_outputs=1
    )
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(kind)
    graph = ir.Graph(
        inputs,
        node.outputs,
        nodes=[node],
        initializers=[h for h in held if h is not None],
        opset_imports={"": 21, "com.microsoft": 1},
        name="product",
    )
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize(("bits", "symmetric", "group"), CASES)
def test_the_packed_codes_multiply_like_the_dequantized_weight(bits: int, symmetric: bool, group: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    q = quantize_rtn(
        torch.randn(48, 384, generator=generator), QuantScheme(bits=bits, symmetric=symmetric, group_size=group)
    )
    x = torch.randn(5, 384, generator=generator)
    want = (x.double() @ q.dequantize().double().T).numpy()
    got = run_product(x.numpy(), q, level=0)
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("columns", [48, 80, 96])
def test_an_odd_number_of_groups_packs_its_zero_points(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    q = quantize_rtn(torch.randn(8, columns, generator=generator), QuantScheme(symmetric=False, group_size=16))
    x = torch.randn(3, columns, generator=generator)
    want = (x.double() @ q.dequantize().double().T).numpy()
    assert np.abs(run_product(x.numpy(), q, level=0) - want).max() <= 1e-6 * np.abs(want).max()


def test_float16_activations() -> None:
    generator = torch.Generator().manual_seed(1)
    q = quantize_rtn(torch.randn(32, 256, generator=generator), QuantScheme())
    x = torch.randn(4, 256, generator=generator).half()
    want = (x.double() @ q.dequantize().double().T).numpy()
    assert np.abs(run_product(x.numpy(), q, level=0) - want).max() <= 2e-3 * np.abs(want).max()


def test_the_first_value_is_in_the_lowest_bits() -> None:
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist() == [0b00111001, 1]
    assert pack_bits(torch.tensor([7, 200], dtype=torch.uint8), 8).tolist() == [7, 200]
