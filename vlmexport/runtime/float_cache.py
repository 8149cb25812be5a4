"""An ONNX decoder with an INT8 key-value cache, changed to hold floats: the gate looks at it without the rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_CACHE = ("past_key_values.", "present.")
_SETTINGS = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")
_SCALES = 12
_ACTIVATIONS = (1, 10)  # TensorProto.FLOAT, FLOAT16


def with_float_cache(model: Any) -> None:
    """Take the quantization out of every GroupQueryAttention of the ONNX ``ModelProto``, in place.

    The cache gets the activations' type, that of the first float input. A graph whose cache is not quantized stays as
    it is.
    """
    nodes = [node for graph in _graphs(model.graph) for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not any([_unquantize(node) for node in nodes]):
        return
    given = [i.type.tensor_type.elem_type for i in model.graph.input if not i.name.startswith(_CACHE)]
    kind = next(kind for kind in given if kind in _ACTIVATIONS)
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.name.startswith(_CACHE):
                value.type.tensor_type.elem_type = kind


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph and those inside its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _unquantize(node: Any) -> bool:
    """Drop the scales and their attributes; False when there are none."""
    kept = [a for a in node.attribute if a.name not in _SETTINGS]
    if len(kept) == len(node.attribute):
        return False
    inputs = [*node.input[:_SCALES], "", "", *node.input[_SCALES + 2 :]]
    while inputs and not inputs[-1]:
        inputs.pop()
    del node.attribute[:], node.input[:]
    node.attribute.extend(kept)
    node.input.extend(inputs)
    return True
