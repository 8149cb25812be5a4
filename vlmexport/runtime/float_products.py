"""A graph with INT8 products of rounded activations, changed to multiply the floats: the gate looks at it unrounded."""

from __future__ import annotations

from typing import Any

_CODES, _WEIGHT, _CODES_SCALE, _WEIGHT_SCALE = 0, 1, 2, 3


def with_float_products(model: Any) -> None:
    """Replace every MatMulIntegerToFloat of the ONNX ``ModelProto`` whose input a QuantizeLinear made, in place.

    ``(round(x / s) * s) @ (codes * scale)`` becomes ``x @ (codes * scale)``; a bias stays. Nodes of another form
    (input made otherwise or with another scale or zero point, weights with a zero point) stay.
    """
    from onnx import TensorProto, helper

    rounding = {n.output[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    nodes = []
    for node in model.graph.node:
        source = rounding.get(node.input[_CODES]) if node.op_type == "MatMulIntegerToFloat" else None
        if source is None or not _same_grid(source, node):
            nodes.append(node)
            continue
        out, codes, scale = node.output[0], node.input[_WEIGHT], node.input[_WEIGHT_SCALE]
        bias = node.input[6] if len(node.input) > 6 else ""
        product = f"{out}.product" if bias else out
        nodes += [
            helper.make_node("Cast", [codes], [f"{out}.codes"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}.codes", scale], [f"{out}.weight"]),
            helper.make_node("MatMul", [source.input[0], f"{out}.weight"], [product]),
        ]
        nodes += [helper.make_node("Add", [product, bias], [out])] if bias else []
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _same_grid(rounding: Any, product: Any) -> bool:
    """Does `product` take the codes back by the scale and zero point that `rounding` made them with?"""
    zero_point = product.input[4] if len(product.input) > 4 else ""
    weight_zero_point = product.input[5] if len(product.input) > 5 else ""
    return (rounding.input[1], rounding.input[2]) == (product.input[_CODES_SCALE], zero_point) and not weight_zero_point
