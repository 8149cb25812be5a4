"""Precision of the vision side: which weights can be stored FP16, and FP16 products that cannot overflow."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from vlmexport.target import Dtype

FP16_MAX = 65504.0
# A row or column that loses more than this share of its length to FP16 (normal rounding loses 2e-4 to 3e-4) holds
# values below FP16's normal range.
_LOSS_LIMIT = 1e-3
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class EncoderPrecision:
    """Precision of encoder and projector: how weights are stored, and what products are computed in.

    With `arithmetic` ``fp16`` everything but the products with weights stays FP32: norms, softmax, residual stream.
    """

    storage: Dtype
    arithmetic: Dtype


@dataclass(frozen=True)
class Storage:
    """How one weight is stored, and why."""

    dtype: ir.DataType
    reason: str


def choose_storage(name: str, tensor: torch.Tensor, wanted: Dtype) -> Storage:
    """FP16 where `wanted` and nothing is lost beyond rounding, else FP32, with the reason."""
    if wanted == "fp32":
        return Storage(_FLOAT, "the encoder is kept FP32 (--encoder-dtype fp32)")
    if tensor.ndim < 2:
        return Storage(_FLOAT, "vectors (norms, biases) are too small to be worth rounding")
    values = tensor.detach().float()
    if not bool(values.isfinite().all()):
        return Storage(_FLOAT, f"{name} is not finite; kept as it is")
    largest = float(values.abs().max())
    if largest > FP16_MAX:
        return Storage(_FLOAT, f"its largest value {largest:.3g} overflows FP16 ({FP16_MAX:.0f})")
    loss = _largest_loss(values)
    if loss > _LOSS_LIMIT:
        return Storage(_FLOAT, f"a row or column would lose {loss:.1%} of its length to FP16's subnormal range")
    return Storage(_HALF, "encoder and projector are stored FP16, not quantized")


def _largest_loss(values: torch.Tensor) -> float:
    """Largest relative L2 error of FP16 over the output rows and input columns of a weight."""
    matrix = values.reshape(values.shape[0], -1)
    error = matrix - matrix.half().float()
    ratios = [
        torch.linalg.vector_norm(error, dim=dim) / torch.linalg.vector_norm(matrix, dim=dim).clamp_min(1e-38)
        for dim in (0, 1)
    ]
    return max(float(ratio.max()) for ratio in ratios)


def widen(value: ir.Value, stored: ir.Value, graph: ir.Graph) -> ir.Value:
    """Let every reader of FP32 `value` read `stored` through a Cast, which runtimes fold when they load."""
    cast = ir.node("Cast", [stored], {"to": int(_FLOAT)})
    wide = cast.outputs[0]
    wide.name, wide.dtype, wide.shape = f"{stored.name}.fp32", _FLOAT, stored.shape
    graph.insert_before(graph[0], cast)
    ir.convenience.replace_all_uses_with(value, wide)
    return wide


def half_products(graph: ir.Graph, halves: set[ir.Value]) -> int:
    """Compute every ``MatMul`` of an activation with an FP16-stored weight in FP16; returns how many.

    Each row of the activation is divided by its largest magnitude first, and the FP32 result multiplied by it: no
    activation can overflow FP16, whatever its size, and a product overflows only if a weight column sums to > 65504.
    """
    changed = 0
    for node in list(graph):
        stored = _stored_half(node, halves)
        if stored is not None:
            _half_product(graph, node, stored)
            changed += 1
    return changed


def _stored_half(node: ir.Node, halves: set[ir.Value]) -> ir.Value | None:
    """The FP16 initializer behind the right-hand side of a MatMul (through its Cast to FP32)."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    cast = node.inputs[1].producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] not in halves:
        return None
    return cast.inputs[0]


def _half_product(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    x, out = node.inputs[0], node.outputs[0]
    axes = _constant(graph, "fp16.last_axis", ir.tensor([-1], dtype=ir.DataType.INT64))
    tiny = _constant(graph, "fp16.tiny", ir.tensor(1e-30, dtype=_FLOAT))
    absolute = ir.node("Abs", [x])
    largest = ir.node("ReduceMax", [absolute.outputs[0], axes], {"keepdims": 1})
    scale = ir.node("Max", [largest.outputs[0], tiny])
    unit = ir.node("Div", [x, scale.outputs[0]])
    half = ir.node("Cast", [unit.outputs[0]], {"to": int(_HALF)})
    product = ir.node("MatMul", [half.outputs[0], weight])
    wide = ir.node("Cast", [product.outputs[0]], {"to": int(_FLOAT)})
    scaled = ir.node("Mul", [wide.outputs[0], scale.outputs[0]])
    new = [absolute, largest, scale, unit, half, product, wide, scaled]
    for step in new:
        step.outputs[0].dtype = _HALF if step in (half, product) else _FLOAT
    scaled.outputs[0].shape = out.shape
    graph.insert_before(node, new)
    for place, output in enumerate(graph.outputs):
        if output is out:
            graph.outputs[place] = scaled.outputs[0]
    ir.convenience.replace_all_uses_with(out, scaled.outputs[0])
    graph.remove(node, safe=True)


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.numpy().shape), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]
