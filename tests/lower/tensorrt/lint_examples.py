"""Small graphs (of `lint_graphs`), with what the lint must say of each and what TensorRT for RTX does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from tests.lower.tensorrt.lint_graphs import (
    attention,
    codes,
    dequantize,
    norm,
    ones,
    quantized,
    resize,
    rotary,
    scatter,
    square_mean,
    text,
    unary,
)

# builds; refused (by the parser or by the build); misread: builds, but computes something else or is no valid ONNX.
Verdict = Literal["builds", "refused", "misread"]


@dataclass(frozen=True)
class Example:
    """`rules`: those that find an error; `warnings`: those that warn."""

    name: str
    make: Callable[[], onnx.ModelProto]
    verdict: Verdict
    rules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


_MS = ', "com.microsoft" : 1'
_CAST_NORM = (
    "g (float16[b,16] x) => (float16[b,16] y) { a = Cast<to=1>(x) n = RMSNormalization(a, w) y = Cast<to=10>(n) }"
)
_LOOP = (
    "g (int64 n, float[16] x) => (float[16] y) <bool c = {1}> { y = Loop(n, c, x) <body = b (int64 i, bool ci, "
    "float[16] a) => (bool co, float[16] o) { co = Identity(ci) o = Add(a, a) }> }"
)
_IF = (
    "g (bool c, float[16] x) => (float[16] y) { y = If(c) <then_branch = t () => (float[16] a) { a = Relu(x) }, "
    "else_branch = e () => (float[16] d) { d = %s(x) }> }"
)
_SCAN = (
    "g (float[16] a, float[5,16] x) => (float[16] y, float[5,16] z) { y, z = Scan<num_scan_inputs = 1, body = b ("
    "float[16] s, float[16] r) => (float[16] o, float[16] p) { o = Add(s, r) p = Relu(o) }>(a, x) }"
)
_MASK = ("b", 1, "s", 16)
_STATIC = {"batch": 2, "queries": 4, "kv_heads": 4, "rank": 3}

OPERATORS = (
    Example("standard", lambda: unary("Relu"), "builds"),
    Example("no importer", lambda: unary("DynamicQuantizeLinear"), "refused", ("operator", "types")),
    Example("det in a branch", lambda: text(_IF % "Bernoulli"), "refused", ("operator",), ("control-flow",)),
    Example(
        "nonzero", lambda: text("g (float[b,16] x) => (int64[2,n] y) { y = NonZero(x) }"), "refused", ("operator",)
    ),
    Example(
        "non-maximum suppression",
        lambda: text("g (float[1,16,4] x, float[1,2,16] s) => (int64[n,3] y) { y = NonMaxSuppression(x, s) }"),
        "refused",
        ("operator",),
    ),
    Example("fast gelu", lambda: unary("com.microsoft.FastGelu", domains=_MS), "refused", ("operator",)),
    Example("quick gelu", lambda: unary("com.microsoft.QuickGelu", domains=_MS), "refused", ("operator",)),
    Example("foreign relu", lambda: unary("foo.Relu", domains=', "foo" : 1'), "builds", (), ("operator",)),
    Example("unknown plugin", lambda: unary("foo.Bar", domains=', "foo" : 1'), "refused", ("operator",)),
    Example(
        "microsoft attention",
        lambda: text(
            "g (float16[b,s,64] x) => (float16[b,s,64] y) { y = com.microsoft.Attention<num_heads=4>(x, w, c) }",
            ones("w", [64, 192], np.float16),
            ones("c", [192], np.float16),
            domains=_MS,
        ),
        "refused",
        ("operator",),
    ),
    Example(
        "simplified layer norm",
        lambda: text(
            "g (float[b,16] x) => (float[b,16] y) { y = SimplifiedLayerNormalization(x, w) }",
            ones("w", [16], np.float32),
        ),
        "builds",
        (),
        ("operator",),
    ),
    Example(
        "matmul nbits",
        lambda: text(
            "g (float16[b,32] x) => (float16[b,16] y) "
            "{ y = com.microsoft.MatMulNBits<K=32, N=16, bits=4, block_size=32>(x, w, s) }",
            ones("w", [16, 1, 16], np.uint8),
            ones("s", [16], np.float16),
            domains=_MS,
        ),
        "refused",
        ("operator",),
    ),
    Example("loop", lambda: text(_LOOP), "builds", (), ("control-flow",)),
    Example("if", lambda: text(_IF % "Neg"), "builds", (), ("control-flow",)),
    Example("scan", lambda: text(_SCAN), "builds", (), ("control-flow",)),
    Example("norm before its opset", lambda: norm("RMSNormalization", opset=21), "misread", ("opset",)),
    Example("norm in its opset", lambda: norm("RMSNormalization", opset=23), "builds"),
    Example("attention before its opset", lambda: attention(opset=22), "misread", ("opset",)),
    Example("scatter before its opset", lambda: scatter(opset=23), "misread", ("opset",)),
    Example("int4 before its opset", lambda: dequantize(opset=19), "misread", ("opset", "types")),
    Example("int4 in its opset", lambda: dequantize(opset=21), "builds"),
    Example("opset unknown", lambda: unary("Relu", opset=99), "misread", ("version",)),
    Example("opset 28", lambda: unary("Relu", opset=28), "builds", (), ("version",)),
    Example("newest ir", lambda: unary("Relu", ir=14), "builds", (), ("version",)),
    Example(
        "cast to int16",
        lambda: text("g (float[16] x) => (int16[16] y) { y = Cast<to=5>(x) }"),
        "refused",
        ("type", "value"),
    ),
    Example(
        "through int16",
        lambda: text("g (float[16] x) => (float[16] y) { a = Cast<to=5>(x) y = Cast<to=1>(a) }"),
        "refused",
        ("type",),
    ),
    Example(
        "constant of uint16",
        lambda: text(
            "g (float[2] x) => (float[2] y) { c = Constant<value = uint16[2] {1, 2}>() "
            "d = Cast<to=1>(c) y = Add(x, d) }"
        ),
        "refused",
        ("type",),
    ),
    Example(
        "uint8 in and out",
        lambda: text("g (uint8[4,4] x) => (uint8[4,4] y) { a = Cast<to=1>(x) y = Cast<to=2>(a) }"),
        "builds",
    ),
    Example(
        "uint8 transposed",
        lambda: text("g (uint8[4,4] x) => (float[4,4] y) { a = Transpose(x) y = Cast<to=1>(a) }"),
        "refused",
        ("uint8",),
    ),
    Example(
        "uint8 inside",
        lambda: text("g (float[4] x) => (float[4] y) { a = Cast<to=2>(x) y = Cast<to=1>(a) }"),
        "refused",
        ("uint8",),
    ),
    Example(
        "int4 cast",
        lambda: text("g (float[4,8] x) => (float[4,8] y) { a = Cast<to=1>(w) y = Add(a, x) }", codes("w", [4, 8])),
        "refused",
        ("quantized-constant",),
    ),
    Example(
        "int8 cast",
        lambda: text("g (float[8] x) => (float[8] y) { a = Cast<to=1>(w) y = Add(a, x) }", ones("w", [8], np.int8)),
        "refused",
        ("quantized-constant",),
    ),
    Example(
        "layer norm with mean",
        lambda: text(
            "g (float[b,16] x) => (float[b,16] y, float[b,1] m) { y, m = LayerNormalization(x, w) }",
            ones("w", [16], np.float32),
        ),
        "refused",
        ("outputs",),
    ),
    Example("layer norm", lambda: norm("LayerNormalization"), "builds"),
    Example("resize", lambda: resize('mode="linear"'), "builds"),
    Example("resize cubic", lambda: resize('mode="cubic"'), "builds"),
    Example("resize antialias", lambda: resize('mode="linear", antialias=1'), "refused", ("attribute",)),
    Example(
        "resize crop",
        lambda: resize('coordinate_transformation_mode="half_pixel_symmetric"'),
        "refused",
        ("attribute",),
    ),
    Example(
        "grid sample",
        lambda: text(
            "g (float[b,3,8,8] x, float[b,4,4,2] p) => (float[b,3,4,4] y) "
            '{ y = GridSample<mode="cubic", padding_mode="reflection">(x, p) }'
        ),
        "builds",
    ),
    Example(
        "dilated pool",
        lambda: text(
            "g (float[b,3,8,8] x) => (float[b,3,h,w] y) { y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x) }"
        ),
        "refused",
        ("attribute",),
    ),
    Example(
        "pool",
        lambda: text("g (float[b,3,8,8] x) => (float[b,3,h,w] y) { y = AveragePool<kernel_shape=[2,2]>(x) }"),
        "builds",
    ),
    Example(
        "mod of floats", lambda: text("g (float[8] x) => (float[8] y) { y = Mod(x, x) }"), "refused", ("attribute",)
    ),
    Example("fmod", lambda: text("g (float[8] x) => (float[8] y) { y = Mod<fmod=1>(x, x) }"), "builds"),
    Example(
        "axes of the caller",
        lambda: text("g (float[4,16] x, int64[1] a) => (float[k,l] y) { y = ReduceSum(x, a) }"),
        "refused",
        ("constant-input",),
    ),
    Example(
        "axes computed",
        lambda: text(
            "g (float[4,16] x) => (float[k,l] y) <int64[1] a = {1}> { b = Concat<axis=0>(a) y = ReduceSum(x, b) }"
        ),
        "refused",
        ("constant-input",),
    ),
    Example(
        "axes cast",
        lambda: text(
            "g (float[4,16] x) => (float[k,l] y) <int32[1] a = {1}> { b = Cast<to=7>(a) y = ReduceSum(x, b) }"
        ),
        "builds",
    ),
    Example(
        "squeeze by the caller",
        lambda: text("g (float[1,16] x, int64[1] a) => (float[k] y) { y = Squeeze(x, a) }"),
        "refused",
        ("constant-input",),
    ),
    Example("fp16 layer norm", lambda: norm("LayerNormalization", "float16"), "misread", ("fp16-norm",)),
    Example("fp16 rms norm", lambda: norm("RMSNormalization", "float16"), "misread", ("fp16-norm",)),
    Example("fp32 norm of fp16", lambda: text(_CAST_NORM, ones("w", [16], np.float32)), "builds"),
    Example(
        "fp16 group norm",
        lambda: text(
            "g (float16[b,16,4] x) => (float16[b,16,4] y) { y = GroupNormalization<num_groups=4>(x, w, w) }",
            ones("w", [16], np.float16),
        ),
        "misread",
        ("fp16-norm",),
    ),
    Example("fp16 norm by pow", lambda: square_mean("float16", "Pow(x, two)"), "misread", ("fp16-norm",)),
    Example("fp16 norm by mul", lambda: square_mean("float16", "Mul(x, x)"), "misread", ("fp16-norm",)),
    Example("fp32 norm by pow", lambda: square_mean("float", "Pow(x, two)"), "builds"),
    Example("fp16 mean", lambda: square_mean("float16", "Mul(x, two)"), "builds"),
    Example(
        "fp16 l2",
        lambda: text("g (float16[b,16] x) => (float16[k,l] y) <int64[1] a = {1}> { y = ReduceL2(x, a) }"),
        "misread",
        ("fp16-norm",),
    ),
    Example("fp16 softmax", lambda: unary("Softmax", "float16"), "misread", ("fp16-softmax",)),
    Example("fp32 softmax", lambda: unary("Softmax"), "builds"),
    Example(
        "layer norm of two types",
        lambda: norm("LayerNormalization", "float16", "float"),
        "refused",
        ("fp16-norm", "norm-scale", "types"),
    ),
    Example(
        "matmul of two types",
        lambda: text("g (float16[b,16] x) => (float16[b,16] y) { y = MatMul(x, w) }", ones("w", [16, 16], np.float32)),
        "refused",
        ("types",),
    ),
    Example(
        "unused string",
        lambda: text("g (float[4] x) => (float[4] y) { y = Relu(x) }", helper.make_tensor("w", T.STRING, [1], [b"a"])),
        "refused",
        ("initializer",),
    ),
    Example(
        "uint32 input", lambda: text("g (uint32[4] x) => (float[4] y) { y = Cast<to=1>(x) }"), "refused", ("value",)
    ),
    Example("double", lambda: unary("Relu", "double"), "builds", (), ("value",)),
    Example("bool", lambda: unary("Not", "bool"), "builds"),
    Example(
        "large int64",
        lambda: text(
            "g (int64[2] x) => (int64[2] y) { y = Add(x, w) }", numpy_helper.from_array(np.array([2**40] * 2), "w")
        ),
        "builds",
    ),
    Example(
        "nine axes",
        lambda: text("g (float[1,1,1,1,1,1,1,1,1] x) => (float[1,1,1,1,1,1,1,1,1] y) { y = Relu(x) }"),
        "refused",
        ("value",),
    ),
    Example(
        "sequence", lambda: text("g (seq(float[4]) x) => (seq(float[4]) y) { y = Identity(x) }"), "refused", ("value",)
    ),
)

DECODERS = (
    Example("attention", attention, "builds"),
    Example("attention of rank 3", lambda: attention(rank=3), "builds"),
    Example("one key head", lambda: attention(kv_heads=1), "builds"),
    Example("14 over 2 heads", lambda: attention(14), "builds"),
    Example("4 over 3 heads", lambda: attention(kv_heads=3), "refused", ("attention-heads",)),
    Example("wide values", lambda: attention(value_size=32), "refused", ("attention-heads",)),
    Example("bool mask", lambda: attention(mask=_MASK), "builds"),
    Example("mask for all heads", lambda: attention(mask=("b", 4, "s", 16)), "builds"),
    Example("mask of rank 3", lambda: attention(mask=(1, "s", 16)), "builds"),
    Example("mask of rank 2", lambda: attention(mask=("s", 16)), "builds"),
    Example("fp16 mask", lambda: attention(mask=_MASK, mask_type=T.FLOAT16), "builds"),
    Example("fp32 mask", lambda: attention(mask=_MASK, mask_type=T.FLOAT), "refused", ("attention-mask",)),
    Example("int64 mask", lambda: attention(mask=_MASK, mask_type=T.INT64), "refused", ("attention-mask",)),
    Example("short mask", lambda: attention(mask=("b", 1, "s", 12)), "refused", ("attention-mask",)),
    Example("mask of three heads", lambda: attention(mask=("b", 3, "s", 16)), "refused", ("attention-mask",)),
    Example("causal", lambda: attention(is_causal=1), "builds"),
    Example("causal and mask", lambda: attention(is_causal=1, mask=_MASK), "refused", ("attention-attribute",)),
    Example("softcap", lambda: attention(softcap=30.0), "refused", ("attention-attribute",)),
    Example("softcap 0", lambda: attention(softcap=0.0), "builds"),
    Example("softmax precision", lambda: attention(softmax_precision=1), "refused", ("attention-attribute",)),
    Example("scores' mode without scores", lambda: attention(qk_matmul_output_mode=1), "builds"),
    Example("present outputs", lambda: attention(outputs=3), "refused", ("attention-outputs",)),
    Example("past inputs", lambda: attention(past=True), "refused", ("attention-inputs",)),
    Example("length without padding", lambda: attention(nonpad=True), "misread", ("attention-inputs",)),
    Example("bf16", lambda: attention(dtype=T.BFLOAT16), "builds"),
    Example("fp32", lambda: attention(dtype=T.FLOAT), "refused", ("attention-kernel",)),
    Example("fp32, masked", lambda: attention(dtype=T.FLOAT, mask=_MASK), "refused", ("attention-kernel",)),
    Example("fp32, fixed sizes", lambda: attention(dtype=T.FLOAT, **_STATIC), "builds"),
    Example("heads of 512, fixed sizes", lambda: attention(size=512, **_STATIC), "builds"),
    Example(
        "fp32, fixed, causal",
        lambda: attention(dtype=T.FLOAT, is_causal=1, **_STATIC),
        "refused",
        ("attention-kernel",),
    ),
    Example("heads of 8", lambda: attention(size=8), "refused", ("attention-kernel",)),
    Example("heads of 9", lambda: attention(size=9), "builds"),
    Example("heads of 100", lambda: attention(size=100), "builds"),
    Example("heads of 100, masked", lambda: attention(size=100, mask=_MASK), "refused", ("attention-kernel",)),
    Example("heads of 12, masked", lambda: attention(size=12, mask=_MASK), "refused", ("attention-kernel",)),
    Example("heads of 72, masked", lambda: attention(size=72, mask=_MASK), "builds"),
    Example("heads of 256, masked", lambda: attention(size=256, mask=_MASK), "builds"),
    Example("heads of 257", lambda: attention(size=257), "refused", ("attention-kernel",)),
    Example("scatter", scatter, "builds"),
    Example("scatter along 2", lambda: scatter(axis=2), "builds"),
    Example("scatter along 1", lambda: scatter(axis=1), "refused", ("scatter-form",)),
    Example("circular", lambda: scatter(mode="circular"), "refused", ("attribute",)),
    Example("cache of rank 3", lambda: scatter(rank=3), "refused", ("scatter-form",)),
    Example("fp32 cache", lambda: scatter(dtype=T.FLOAT), "builds"),
    Example("int8 cache", lambda: scatter(dtype=T.INT8), "refused", ("scatter-form",)),
    Example("cache of any length", lambda: scatter(slots="c"), "refused", ("scatter-form",)),
    Example("computed cache", lambda: scatter(computed=True), "refused", ("scatter-memory",)),
    Example("cache kept inside", lambda: scatter(output=False), "refused", ("scatter-memory",)),
    Example("update that fits", lambda: scatter(tokens=16), "builds"),
    Example("update too long", lambda: scatter(tokens=17), "refused", ("scatter-length",)),
    Example("rotary", rotary, "builds"),
    Example("rotary, interleaved", lambda: rotary(interleaved=1), "builds"),
    Example("rotary of a part", lambda: rotary(rotary_embedding_dim=8, half=4), "builds"),
    Example("rotary of rank 3", lambda: rotary(rank=3), "builds"),
    Example("rotary without positions", lambda: rotary(positions=False), "builds"),
    Example("fp32 cosines", lambda: rotary(cos_type=np.float32), "refused", ("rotary", "types")),
    Example("wide cosines", lambda: rotary(half=16), "refused", ("rotary",)),
    Example("int4", dequantize, "builds"),
    Example("int4 in blocks of 128", lambda: dequantize(128, block=128), "builds"),
    Example("int4 in blocks of 16", lambda: dequantize(block=16), "builds", (), ("quantized-scale",)),
    Example("int4 on axis 1", lambda: dequantize(16, 64, axis=1), "builds"),
    Example("fp32 scales", lambda: dequantize(scale_type=np.float32), "builds"),
    Example("broken block", lambda: dequantize(80), "refused", ("quantized-scale",)),
    Example(
        "other blocks than named", lambda: dequantize(block=16, scale_shape=[2, 16]), "misread", ("quantized-scale",)
    ),
    Example("zero point of 0", lambda: dequantize(zero=0), "builds"),
    Example("zero point of 1", lambda: dequantize(zero=1), "refused", ("zero-point",)),
    Example("uint4", lambda: dequantize(dtype=T.UINT4), "refused", ("quantized-codes", "initializer")),
    Example("odd count", lambda: dequantize(3, 5, block=0, axis=1, scale_shape=[5]), "refused", ("quantized-codes",)),
    Example("int8 by column", lambda: dequantize(dtype=T.INT8, block=0, axis=1, scale_shape=[16]), "builds"),
    Example("int8 by row", lambda: dequantize(dtype=T.INT8, block=0, scale_shape=[64]), "builds"),
    Example("int8, one scale", lambda: dequantize(dtype=T.INT8, block=0, scale_shape=[]), "builds"),
    Example("int8 in blocks", lambda: dequantize(dtype=T.INT8), "builds"),
    Example(
        "int8, too few scales",
        lambda: dequantize(dtype=T.INT8, block=0, scale_shape=[16]),
        "refused",
        ("quantized-scale",),
    ),
    Example(
        "int8, zero point of 1",
        lambda: dequantize(dtype=T.INT8, block=0, axis=1, scale_shape=[16], zero=1),
        "refused",
        ("zero-point",),
    ),
    Example(
        "uint8", lambda: dequantize(dtype=T.UINT8, block=0, axis=1, scale_shape=[16]), "refused", ("quantized-codes",)
    ),
    Example(
        "int32", lambda: dequantize(dtype=T.INT32, block=0, axis=1, scale_shape=[16]), "refused", ("quantized-codes",)
    ),
)
ACTIVATIONS = (
    Example("int8 activations", lambda: quantized(", z"), "builds"),
    Example("uint8 activations", lambda: quantized(", z", np.uint8), "builds"),
    Example("activations without zero point", lambda: quantized(""), "builds"),
    Example("activations around 1", lambda: quantized(", z", value=1), "refused", ("zero-point",)),
    Example(
        "zero point of the caller",
        lambda: text(
            "g (float[4,16] x, int8 z) => (float[4,16] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s) }",
            ones("s", [], np.float32),
        ),
        "refused",
        ("zero-point",),
    ),
)
EXAMPLES = (*OPERATORS, *ACTIVATIONS, *DECODERS)
