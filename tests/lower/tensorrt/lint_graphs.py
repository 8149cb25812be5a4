"""Graphs of a node or two for the lint's examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper, parser


def text(
    body: str, *initializers: onnx.TensorProto, opset: int = 24, domains: str = "", ir: int = 11
) -> onnx.ModelProto:
    """A model from ONNX's text format."""
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]> {body}')
    model.graph.initializer.extend(initializers)
    return model


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Any]],
    outputs: Sequence[tuple[str, int, Any]],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = 24,
) -> onnx.ModelProto:
    """A model of nodes."""
    values = [[helper.make_tensor_value_info(*v) for v in group] for group in (inputs, outputs)]
    made = helper.make_graph(list(nodes), "g", values[0], values[1], list(initializers))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def ones(name: str, shape: Sequence[int], dtype: Any) -> onnx.TensorProto:
    """An initializer of ones."""
    return numpy_helper.from_array(np.ones(shape, dtype), name)


def codes(name: str, shape: Sequence[int], dtype: int = T.INT4, value: int = 1) -> onnx.TensorProto:
    """4-bit codes, each `value`."""
    packed = bytes([value | value << 4] * ((int(np.prod(shape)) + 1) // 2))
    return helper.make_tensor(name, dtype, list(shape), packed, raw=True)


def attention(
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 64,
    *,
    dtype: int = T.FLOAT16,
    mask: Sequence[Any] | None = None,
    mask_type: int = T.BOOL,
    rank: int = 4,
    batch: Any = "b",
    queries: Any = "s",
    value_size: int = 0,
    outputs: int = 1,
    past: bool = False,
    nonpad: bool = False,
    opset: int = 24,
    **attrs: Any,
) -> onnx.ModelProto:
    """One Attention over 16 keys."""
    value_size = value_size or size
    dims: list[list[Any]] = [
        [batch, heads, queries, size],
        [batch, kv_heads, 16, size],
        [batch, kv_heads, 16, value_size],
    ]
    if rank == 3:
        dims = [[b, s, n * d] for b, n, s, d in dims]
        attrs |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
    inputs: list[tuple[str, int, Any]] = [(n, dtype, d) for n, d in zip("qkv", dims, strict=True)]
    names = ["q", "k", "v", "m" if mask is not None else ""]
    if mask is not None:
        inputs.append(("m", mask_type, list(mask)))
    if past:
        inputs += [(n, dtype, [batch, kv_heads, 5, size]) for n in ("pk", "pv")]
        names += ["pk", "pv"]
    if nonpad:
        inputs.append(("n", T.INT64, [batch]))
        names += ["", "", "n"]
    results = ["y", "ok", "ov"][:outputs]
    node = helper.make_node("Attention", names, results, name="att", **attrs)
    return graph([node], inputs, [(r, dtype, None) for r in results], opset=opset)


def scatter(
    *,
    axis: int = -2,
    mode: str = "linear",
    dtype: int = T.FLOAT16,
    slots: Any = 16,
    tokens: Any = "s",
    rank: int = 4,
    computed: bool = False,
    output: bool = True,
    opset: int = 24,
) -> onnx.ModelProto:
    """One TensorScatter into a cache [b, 2, slots, 64]."""
    cache, update = ["b", 2, slots, 64], ["b", 2, tokens, 64]
    if rank == 3:
        cache, update = ["b", slots, 64], ["b", tokens, 64]
    inputs = [("past", dtype, cache), ("new", dtype, update), ("at", T.INT64, ["b"])]
    nodes = [helper.make_node("Abs", ["past"], ["cache"], name="abs")] if computed else []
    names = ["cache" if computed else "past", "new", "at"]
    nodes.append(helper.make_node("TensorScatter", names, ["present"], name="scatter", axis=axis, mode=mode))
    nodes.append(helper.make_node("Identity", ["present"], ["y"], name="copy"))
    outputs = [("y", dtype, cache), *([("present", dtype, cache)] if output else [])]
    return graph(nodes, inputs, outputs, opset=opset)


def rotary(
    *, cos_type: Any = np.float16, half: int = 8, rank: int = 4, positions: bool = True, **attrs: Any
) -> onnx.ModelProto:
    """One RotaryEmbedding of 4 heads of 16, in FP16."""
    inputs: list[tuple[str, int, Any]] = [("x", T.FLOAT16, ["b", 4, "s", 16] if rank == 4 else ["b", "s", 64])]
    names, tables = ["x", "cos", "sin"], []
    if positions:
        tables = [ones(n, [32, half], cos_type) for n in ("cos", "sin")]
        inputs.append(("p", T.INT64, ["b", "s"]))
        names.append("p")
    else:
        inputs += [(n, T.FLOAT16, ["b", "s", half]) for n in ("cos", "sin")]
    if rank == 3:
        attrs["num_heads"] = 4
    node = helper.make_node("RotaryEmbedding", names, ["y"], name="rot", **attrs)
    return graph([node], inputs, [("y", T.FLOAT16, None)], tables)


def dequantize(
    k: int = 64,
    n: int = 16,
    *,
    axis: int = 0,
    block: int = 32,
    dtype: int = T.INT4,
    scale_shape: Sequence[int] | None = None,
    scale_type: Any = np.float16,
    zero: int | None = None,
    opset: int = 24,
) -> onnx.ModelProto:
    """A MatMul with quantized weights [k, n]."""
    if scale_shape is None:
        scale_shape = [-(-d // block) if block and i == axis % 2 else d for i, d in enumerate((k, n))]
    plain = {T.INT8: np.int8, T.UINT8: np.uint8, T.INT32: np.int32}.get(dtype)
    tensors = [ones("w", [k, n], plain) if plain else codes("w", [k, n], dtype), ones("s", scale_shape, scale_type)]
    names = ["w", "s"]
    if zero is not None:
        names.append("z")
        flat = (
            numpy_helper.from_array(np.full(scale_shape, zero, plain), "z")
            if plain
            else codes("z", scale_shape, dtype, zero)
        )
        tensors.append(flat)
    attrs = {"axis": axis, **({"block_size": block} if block else {})}
    nodes = [
        helper.make_node("DequantizeLinear", names, ["d"], name="dq", **attrs),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="mm"),
    ]
    float_type = helper.np_dtype_to_tensor_dtype(np.dtype(scale_type))
    return graph(nodes, [("x", float_type, ["b", k])], [("y", float_type, ["b", n])], tensors, opset)


def quantized(zero: str, dtype: Any = np.int8, value: int = 0) -> onnx.ModelProto:
    """Activations through 8 bits; `zero` is ``z`` with a constant zero point, or empty."""
    body = f"g (float[4,16] x) => (float[4,16] y) {{ q = QuantizeLinear(x, s{zero}) y = DequantizeLinear(q, s{zero}) }}"
    scale, point = ones("s", [], np.float32), numpy_helper.from_array(np.array(value, dtype), "z")
    return text(body, scale, *([point] if zero else []))


def norm(op: str, dtype: str = "float", scale: str = "", opset: int = 24) -> onnx.ModelProto:
    """One norm over 16 features, scaled by ones."""
    weights = ones("w", [16], {"float": np.float32, "float16": np.float16}[scale or dtype])
    return text(f"g ({dtype}[b, s, 16] x) => ({dtype}[b, s, 16] y) {{ y = {op}(x, w) }}", weights, opset=opset)


def unary(op: str, dtype: str = "float", **kwargs: Any) -> onnx.ModelProto:
    """y = op(x) of 16 numbers a row."""
    return text(f"g ({dtype}[b, 16] x) => ({dtype}[b, 16] y) {{ y = {op}(x) }}", **kwargs)


def resize(attrs: str) -> onnx.ModelProto:
    """A picture, twice as large."""
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "sc")
    return text(f"g (float[b,3,8,8] x) => (float[b,3,16,16] y) {{ y = Resize<{attrs}>(x, , sc) }}", scales)


def square_mean(dtype: str, square: str) -> onnx.ModelProto:
    """An RMS norm, written out."""
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    constants = numpy_helper.from_array(np.array(2, kind), "two"), numpy_helper.from_array(np.array([1]), "axes")
    body = f"q = {square} m = ReduceMean(q, axes) r = Sqrt(m) y = Div(x, r)"
    return text(f"g ({dtype}[b, 16] x) => ({dtype}[b, 16] y) {{ {body} }}", *constants)
