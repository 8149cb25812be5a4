"""Matrices of ``DequantizeLinear`` and ``MatMul``: read back by value, and each way to hide one is a fault."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vlmexport.errors import ArtifactError
from vlmexport.manifest import Artifact, Manifest, PartFile, QuantizedMember, QuantizedRecord, write_manifest
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.verify.codes import read_codes, unrecorded_matrices
from vlmexport.verify.dequantize import unpack_dequantized

ROWS, COLUMNS = 6, 64


def quantized(bits, blocked):
    torch.manual_seed(0)
    scheme = QuantScheme(bits=bits, symmetric=True, group_size=32 if blocked else COLUMNS)
    tensor = quantize_rtn(torch.randn(ROWS, COLUMNS), scheme)
    return replace(tensor, scale=tensor.scale.half())


def export(folder, bits, *, blocked=None, extra=(), feeds="MatMul", consumers=1, scale=1.0, **attributes):
    """A decoder of one stored matrix; the defaults are right, and every argument plants a fault."""
    blocked = bits == 4 if blocked is None else blocked
    tensor = quantized(bits, blocked)
    kind = ml_dtypes.int4 if bits == 4 else np.int8
    axis = {"axis": 0, "block_size": 32} if blocked else {"axis": 1}
    codes = (tensor.codes.numpy().T.astype(np.int16) - (1 << (bits - 1))).astype(np.int8).astype(kind)
    scales = tensor.scale.numpy().T * np.float16(scale)
    stored = [_int4(codes) if bits == 4 else numpy_helper.from_array(codes, "w.codes")]
    stored.append(numpy_helper.from_array(scales if blocked else scales[0], "w.scale"))
    nodes = [helper.make_node("DequantizeLinear", ["w.codes", "w.scale", *extra], ["w"], **{**axis, **attributes})]
    nodes += [helper.make_node(feeds, ["x", "w"], [f"y{i}"]) for i in range(consumers)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT16, ["b", ROWS]) for i in range(consumers)]
    zero = numpy_helper.from_array(np.zeros(ROWS, np.int8), "zero")
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["b", COLUMNS])]
    graph = helper.make_graph(nodes, "g", given, outputs, [*stored, zero])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), folder / "decoder.onnx"
    )
    members = (QuantizedMember("a", (0, 4), tensor.rows(0, 4).digest()),)
    members += (QuantizedMember("b", (4, ROWS), tensor.rows(4, ROWS).digest()),)
    record = QuantizedRecord("decoder", "w", bits, tensor.group_size, True, COLUMNS, members)
    parts = {"decoder": PartFile("decoder.onnx", (), ())}
    return write_manifest(folder, Manifest("tensorrt", "tensorrt", {}, {}, {}, {}, parts, (record,), ()))


def _int4(codes):
    flat = codes.astype(np.int8).reshape(-1)
    packed = ((flat[0::2] & 15) | ((flat[1::2] & 15) << 4)).astype(np.uint8).tobytes()
    return helper.make_tensor("w.codes", TensorProto.INT4, codes.shape, packed, raw=True)


def reasons(artifact):
    return {f.reason for f in read_codes(artifact)[1]}


@pytest.mark.parametrize(("bits", "blocked"), [(4, True), (8, False), (8, True)])
def test_codes_of_stacked_weights_come_back(tmp_path, bits, blocked):
    made = export(tmp_path, bits, blocked=blocked)
    tensors, faults = read_codes(made)
    assert faults == unrecorded_matrices(made) == []
    found = torch.cat([tensors["a"].dequantize(), tensors["b"].dequantize()])
    assert torch.equal(found, quantized(bits, blocked).dequantize())


def test_onnxruntime_multiplies_with_what_was_read(tmp_path):
    import onnxruntime

    for bits in (4, 8):
        made = export(tmp_path, bits)
        tensors, _ = read_codes(made)
        rows = np.eye(COLUMNS, dtype=np.float16)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(made.part_path("decoder"), options)
        (found,) = session.run(None, {"x": rows})
        wanted = torch.cat([tensors["a"].dequantize(), tensors["b"].dequantize()]).half()
        assert np.array_equal(found.T, wanted.numpy())


@pytest.mark.parametrize(
    ("bits", "change", "reason"),
    [
        (4, {"scale": 1.5}, "codes, scales or zero points differ"),
        (8, {"scale": 1.5}, "codes, scales or zero points differ"),
        (8, {"extra": ("zero",)}, "and no zero points"),
        (4, {"feeds": "Add"}, "its values go to Add"),
        (4, {"consumers": 0}, "its values go to nothing"),
        (4, {"block_size": 16}, "no quantized matrix of this layout"),
        (4, {"blocked": False}, "no quantized matrix of this layout"),
        (8, {"axis": 0}, "no quantized matrix of this layout"),
    ],
)
def test_each_fault_is_named(tmp_path, bits, change, reason):
    (found,) = reasons(export(tmp_path, bits, **change))
    assert reason in found


def test_a_matrix_that_is_left_operand_or_output_too_is_a_fault(tmp_path):
    made = export(tmp_path, 4)
    path = made.part_path("decoder")
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT16, [COLUMNS, ROWS]))
    onnx.save(model, path)
    assert "the graph's outputs" in reasons(made).pop()
    del model.graph.output[-1]
    model.graph.node.append(helper.make_node("MatMul", ["w", "w"], ["z"]))
    onnx.save(model, path)
    assert "MatMul (operand 0)" in reasons(made).pop()


def test_a_second_node_with_other_scales_on_the_same_codes_is_a_fault(tmp_path):
    made = export(tmp_path, 4)
    path = made.part_path("decoder")
    model = onnx.load(path)
    second = [
        helper.make_node("DequantizeLinear", ["w.codes", "other"], ["v"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "v"], ["z"]),
    ]
    for node in reversed(second):
        model.graph.node.insert(0, node)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, ROWS), np.float16), "other"))
    onnx.save(model, path)
    assert "the node reads ['w.codes', 'other']" in reasons(made).pop()


def test_a_matrix_that_the_manifest_hides_is_found_also_in_an_unquantized_export(tmp_path):
    made = export(tmp_path, 4)
    for records in ((replace(made.manifest.quantized[0], initializer="other"),), ()):
        hidden = Artifact(made.path, replace(made.manifest, quantized=records))
        assert [f.weight for f in unrecorded_matrices(hidden)] == ["w"]


@pytest.mark.parametrize("change", [{"group_size": 16}, {"in_features": 32}, {"bits": 8}, {"symmetric": False}])
def test_a_record_that_disagrees_with_the_graph_is_a_fault_of_every_member(tmp_path, change):
    made = export(tmp_path, 4)
    record = replace(made.manifest.quantized[0], **change)
    tensors, faults = read_codes(Artifact(made.path, replace(made.manifest, quantized=(record,))))
    assert tensors == {}
    assert [f.weight for f in faults] == ["a", "b"]


def test_other_types_of_codes_and_scales_are_refused():
    scale = np.ones((2, 3), np.float16)
    with pytest.raises(ArtifactError, match="uint8 codes"):
        unpack_dequantized(np.zeros((64, 3), np.uint8), scale, axis=0, block_size=32)
    with pytest.raises(ArtifactError, match="float64 scales"):
        unpack_dequantized(np.zeros((64, 3), ml_dtypes.int4), scale.astype(np.float64), axis=0, block_size=32)
