"""The float form of a graph with an INT8 cache computes what the plain graph computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlmexport.runtime.float_cache import with_float_cache

HEADS, KV, DIM, LENGTH = 4, 2, 16, 6


def model(float_type: int, quantized: bool) -> onnx.ModelProto:
    cache = TensorProto.INT8 if quantized else float_type
    dtype = helper.tensor_dtype_to_np_dtype(float_type)
    angles = np.arange(32)[:, None] * (1e4 ** (-np.arange(0, DIM, 2) / DIM))
    weights = {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}
    inputs = ["x", "", "", "past_key_values.0.key", "past_key_values.0.value", "last", "total", "cos", "sin"]
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV, "do_rotary": 1}
    if quantized:
        inputs += ["", "", "", "key_scale", "value_scale"]
        weights |= {n: np.full((1, KV, 1, DIM), 0.5, np.float32) for n in ("key_scale", "value_scale")}
        attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    outputs = ["y", "present.0.key", "present.0.value"]
    node = helper.make_node("GroupQueryAttention", inputs, outputs, domain="com.microsoft", **attributes)
    value, width = helper.make_tensor_value_info, (HEADS + 2 * KV) * DIM
    graph = helper.make_graph(
        [node],
        "decoder",
        [
            value("x", float_type, [1, "s", width]),
            *(value(f"past_key_values.0.{k}", cache, [1, KV, "p", DIM]) for k in ("key", "value")),
            value("last", TensorProto.INT32, [1]),
            value("total", TensorProto.INT32, []),
        ],
        [
            value("y", float_type, [1, "s", HEADS * DIM]),
            *(value(f"present.0.{k}", cache, [1, KV, "t", DIM]) for k in ("key", "value")),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(proto: onnx.ModelProto, dtype: Any, cache: Any) -> list[np.ndarray]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, LENGTH, (HEADS + 2 * KV) * DIM)).astype(dtype)
    past = {f"past_key_values.0.{k}": np.zeros((1, KV, 0, DIM), cache) for k in ("key", "value")}
    lengths = {"last": np.array([LENGTH - 1], np.int32), "total": np.array(LENGTH, np.int32)}
    found: list[np.ndarray] = session.run(None, {"x": x, **past, **lengths})
    return found


@pytest.mark.parametrize(("float_type", "dtype"), [(TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16)])
def test_without_its_scales_the_graph_is_the_plain_one(float_type: int, dtype: Any) -> None:
    plain, changed = model(float_type, False), model(float_type, True)
    rounded = run(changed, dtype, np.int8)
    with_float_cache(changed)
    for wanted, found, coarse in zip(run(plain, dtype, dtype), run(changed, dtype, dtype), rounded, strict=True):
        assert found.dtype == dtype and np.array_equal(found, wanted)
        assert not np.array_equal(coarse, wanted)


def test_a_plain_graph_stays_as_it_is() -> None:
    plain = model(TensorProto.FLOAT, False)
    before = plain.SerializeToString()
    with_float_cache(plain)
    assert plain.SerializeToString() == before


def test_attention_inside_control_flow_is_changed_too() -> None:
    inner = model(TensorProto.FLOAT, True).graph
    condition = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    body = helper.make_graph(list(inner.node), "branch", [], list(inner.output))
    other = helper.make_graph(list(inner.node), "other", [], list(inner.output))
    node = helper.make_node("If", ["yes"], [o.name for o in inner.output], then_branch=body, else_branch=other)
    graph = helper.make_graph([node], "outer", [*inner.input, condition], list(inner.output), list(inner.initializer))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with_float_cache(proto)
    branches = [a.g for a in proto.graph.node[0].attribute]
    for branch in branches:
        assert len(branch.node[0].input) == 9
        assert {o.type.tensor_type.elem_type for o in branch.output} == {TensorProto.FLOAT}
    assert {o.type.tensor_type.elem_type for o in proto.graph.output} == {TensorProto.FLOAT}
