"""Products by DequantizeLinear against the dequantized weight, in ONNX Runtime; and what TensorRT for RTX takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from tests.lower.onnx.products import emitted_product, run_model
from tests.lower.onnx.rtx import build_engine
from vlmexport.errors import BadInputError
from vlmexport.lower.onnx.dq import DequantizeEmitter, pack_dequantize
from vlmexport.lower.onnx.weights import WeightGroup, initializer, stream_weights
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import quantize_data_free

INT4 = [make_scheme("rtn", 4, group) for group in (16, 32, 64, 128, 256, -1)]
INT8 = [make_scheme("rtn", 8, group) for group in (-1, 32, 128)]


def title(scheme: QuantScheme) -> str:
    return f"int{scheme.bits}-{scheme.group_size}"


def weights(columns: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return {name: factor * torch.randn(rows, columns, generator=generator) for name, rows in (("q", 32), ("k", 16))}


def expected(parts: dict[str, torch.Tensor], scheme: QuantScheme, x: torch.Tensor) -> np.ndarray:
    dequantized = torch.cat([quantize_data_free(w, scheme).dequantize() for w in parts.values()])
    return (x.double() @ dequantized.double().T).numpy()


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def saved(model: ir.Model, path: Path) -> Path:
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def engine(path: Path) -> str | int:
    """The engine of a product with 3 rows, or why there is none."""
    return build_engine(path, lambda _name, dims, rows: (rows, *dims[1:]), (3,))


@pytest.mark.parametrize("scheme", [*INT4, *INT8], ids=title)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_products_are_those_of_the_dequantized_weight(scheme: QuantScheme, dtype: torch.dtype, limit: float) -> None:
    parts = weights(512)
    model, (record,) = emitted_product(parts, scheme, dtype, 0, {"k": torch.arange(16.0)}, DequantizeEmitter)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = expected(parts, scheme, x) + np.concatenate([np.zeros(32), np.arange(16.0)])
    assert error(run_model(model, x), want) <= limit
    assert (record.bits, record.symmetric, record.codebook) == (scheme.bits, True, "")
    assert record.group_size == (scheme.group_size if scheme.group_size > 0 else {4: 256, 8: 512}[scheme.bits])
    for member, weight in zip(record.members, parts.values(), strict=True):
        assert member.digest == quantize_data_free(weight, scheme).regrouped(record.group_size).digest()


@pytest.mark.parametrize("scheme", [INT4[2], INT8[0]], ids=title)
def test_initializers_are_those_of_the_manifest(scheme: QuantScheme) -> None:
    parts = weights(512)
    model, _ = emitted_product(parts, scheme, torch.float16, 0, {}, DequantizeEmitter)
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "MatMul"]
    assert {n.domain for n in model.graph} == {""}
    found = model.graph.initializers
    tensors = [quantize_data_free(w, scheme) for w in parts.values()]
    codes = torch.cat([t.codes for t in tensors]).int() - (1 << (scheme.bits - 1))
    scale = torch.cat([t.scale for t in tensors]).t().numpy()
    stored = found["packed.weight.codes"].const_value
    assert stored is not None and stored.dtype == {4: ir.DataType.INT4, 8: ir.DataType.INT8}[scheme.bits]
    assert np.array_equal(stored.numpy().astype(np.int32), codes.t().numpy())
    kept = found["packed.weight.scale"].const_value
    assert kept is not None and kept.dtype == ir.DataType.FLOAT16
    assert np.array_equal(kept.numpy(), scale if scheme.bits == 4 else scale.reshape(-1))


@pytest.mark.parametrize("scheme", [INT4[2], INT8[0]], ids=title)
def test_a_wide_product_is_made_in_float32(scheme: QuantScheme) -> None:
    parts = weights(512, factor=2000.0)
    wide = frozenset(parts)
    model, _ = emitted_product(parts, scheme, torch.float16, 0, {}, DequantizeEmitter, wide)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).half()
    got, want = run_model(model, x), expected(parts, scheme, x)
    assert got.dtype == np.float32 and np.abs(want).max() > 65504
    assert error(got, want) <= 1e-6
    narrow, _ = emitted_product(parts, scheme, torch.float16, 0, {}, DequantizeEmitter)
    assert not np.isfinite(run_model(narrow, x)).all()


@pytest.mark.parametrize("rows", [64, 3])
def test_int4_is_streamed_two_per_byte_low_half_first(tmp_path: Path, rows: int) -> None:
    array = np.random.default_rng(0).integers(-8, 8, (rows, 37)).astype(ir.DataType.INT4.numpy())
    value = initializer("codes", ir.DataType.INT4, array.shape)
    out = ir.node("DequantizeLinear", [value, ir.Value(name="scale", type=ir.TensorType(ir.DataType.FLOAT))])
    graph = ir.Graph([out.inputs[1]], out.outputs, nodes=[out], opset_imports={"": 24}, name="one")  # type: ignore[list-item]
    path = tmp_path / "one.onnx"
    group = WeightGroup((value,), lambda: (array,))
    stream_weights(ir.Model(graph, ir_version=12), [group], path, SilentProgress(), "write")
    assert path.with_name("one.onnx_data").is_file() == (rows == 64)
    (read,) = onnx.load(path).graph.initializer  # another reader than the writer
    assert np.array_equal(numpy_helper.to_array(read).astype(np.int8), array.astype(np.int8))
    if rows == 64:
        first, second = (int(v) & 0xF for v in array.astype(np.int8).reshape(-1)[:2])
        assert path.with_name("one.onnx_data").read_bytes()[0] == first | second << 4


def test_packing_refuses_what_the_operator_cannot_say() -> None:
    tensor = quantize_data_free(torch.randn(4, 32), make_scheme("rtn", 4, 32, symmetric=False))
    with pytest.raises(ValueError, match="without zero points"):
        pack_dequantize(tensor)


REFUSED = [
    (make_scheme("rtn", 4, 32, symmetric=False), 1.0, "zero points"),
    (make_scheme("nf4", group_size=64), 1.0, "levels of a table"),
    (make_scheme("rtn", 2, 32), 1.0, "4 or 8 bits, not 2"),
    (make_scheme("rtn", 4, 32), 1e6, "overflows FP16|above FP16"),
    (make_scheme("rtn", 4, 32), 3e4, "above FP16"),
    (make_scheme("rtn", 8, -1), 1e-8, "scales above 0"),
]


@pytest.mark.parametrize(("scheme", "factor", "message"), REFUSED)
def test_refusals_name_the_weight_and_the_reason(scheme: QuantScheme, factor: float, message: str) -> None:
    with pytest.raises(BadInputError, match=f"q.*({message})"):
        emitted_product({"q": weights(512, factor)["q"]}, scheme, torch.float16, 0, {}, DequantizeEmitter)


def test_codes_with_zero_points_behind_a_symmetric_scheme_are_refused() -> None:
    scheme = make_scheme("rtn", 4, 32)
    asymmetric = quantize_data_free(torch.randn(8, 64), make_scheme("rtn", 4, 32, symmetric=False))
    emitter = _given(scheme, asymmetric)
    with pytest.raises(BadInputError, match="zero points or a codebook"):
        emitter.groups[0].produce()


def _given(scheme: QuantScheme, tensor: QuantizedTensor) -> DequantizeEmitter:
    from onnx_ir.tape import Tape

    from tests.lower.onnx.products import one_weight_plan
    from vlmexport.lower.onnx.linear import LinearRef
    from vlmexport.quantize.weights import DecoderWeights

    rows, columns = tensor.shape
    weights = DecoderWeights({"q": torch.zeros(rows, columns)}, {"q": scheme}, {"q": tensor})
    emitter = DequantizeEmitter(weights, one_weight_plan({"q": (rows, columns)}, scheme), ir.DataType.FLOAT16, 0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["rows", columns]))
    emitter.emit(Tape(), x, (LinearRef("q", "", columns, rows),), "q")
    return emitter


@pytest.mark.parametrize("scheme", [*INT4, *INT8], ids=title)
def test_tensorrt_builds_it(scheme: QuantScheme, tmp_path: Path) -> None:
    model, _ = emitted_product(weights(512), scheme, torch.float16, 0, {}, DequantizeEmitter)
    assert isinstance(engine(saved(model, tmp_path / "product.onnx")), int)


@pytest.mark.parametrize("scheme", [INT4[2], INT8[0]], ids=title)
def test_tensorrt_builds_a_wide_product(scheme: QuantScheme, tmp_path: Path) -> None:
    parts = weights(512)
    model, _ = emitted_product(parts, scheme, torch.float16, 0, {}, DequantizeEmitter, frozenset(parts))
    assert isinstance(engine(saved(model, tmp_path / "product.onnx")), int)


def test_tensorrt_refuses_what_the_emitter_refuses(tmp_path: Path) -> None:
    model, _ = emitted_product(weights(512), INT8[0], torch.float16, 0, {}, DequantizeEmitter)
    scale = model.graph.initializers["packed.weight.scale"]
    array = np.array(scale.const_value.numpy())  # type: ignore[union-attr]
    array[0] = 0
    scale.const_value = ir.Tensor(array, name=scale.name)
    assert "must all be positive" in str(engine(saved(model, tmp_path / "product.onnx")))
