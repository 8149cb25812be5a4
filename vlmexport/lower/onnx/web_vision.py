"""The vision graph of the ``transformersjs`` layout: encoder and projector in one, with the inputs the client feeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from vlmexport.families.transformersjs import WebFamily
from vlmexport.lower.onnx.encoder import VisionGraph, store_vision, trace_vision
from vlmexport.lower.onnx.precision import EncoderPrecision
from vlmexport.lower.onnx.web_each import over_pictures
from vlmexport.lower.onnx.weights import typed_value
from vlmexport.model.pictures import EachPicture
from vlmexport.split.parts import Part, Role, Split
from vlmexport.target import Dtype

_BATCH, _PICTURES = "batch_size", "num_images"
_PROMPT_DIMS = 2  # [prompts, pictures, ...]
_FEATURES = "image_features"


@dataclass(frozen=True)
class TracedVision:
    """Encoder and projector, traced once; every dtype's graph is made from copies of the traces."""

    module: nn.Module
    parts: tuple[Part, Part]
    traces: tuple[ir.Model, ir.Model]
    opset: int
    pictures: EachPicture | None = None

    def graph(self, family: WebFamily, storage: Dtype, features: ir.DataType) -> VisionGraph:
        """Pixels float32 to ``image_features [image_tokens, hidden]`` of the type `features`.

        Weights are stored as `storage`; products are float32 in all of them.
        """
        precision = EncoderPrecision(storage, "fp32")
        encoder, projector = (
            store_vision(trace.clone(), self.module, part, precision, self.opset)
            for trace, part in zip(self.traces, self.parts, strict=True)
        )
        joined = _join(encoder, projector)
        if self.pictures is not None:
            over_pictures(joined.model.graph, self.pictures)
        _as_client_feeds(joined.model.graph, family)
        _give(joined.model.graph, features)
        return joined


def trace_web_vision(module: nn.Module, split: Split, opset: int) -> TracedVision:
    """Trace encoder and projector; raises `UnsupportedModelError` where they cannot be."""
    parts = split.parts[Role.VISION_ENCODER], split.parts[Role.PROJECTOR]
    encoder, projector = (trace_vision(module, part, opset) for part in parts)
    return TracedVision(module, parts, (encoder, projector), opset, split.merge.pictures)


def _join(encoder: VisionGraph, projector: VisionGraph) -> VisionGraph:
    """One graph of both, the projector's inputs being the encoder's outputs. Both graphs are used up."""
    first, second = encoder.model.graph, projector.model.graph
    weights = {id(value) for group in projector.groups for value in group.values}
    _prefix_names(second, weights)
    made = {value.name: value for value in first.outputs}
    for value in list(second.inputs):
        given = _as_rows(first, made[value.name], value)
        ir.convenience.replace_all_uses_with(value, given, replace_graph_outputs=True)
    outputs, initializers = list(second.outputs), list(second.initializers.values())
    nodes = list(second)
    second.inputs.clear()
    second.outputs.clear()
    second.initializers.clear()
    second.remove(nodes)
    first.extend(nodes)
    for value in initializers:
        first.register_initializer(value)
    first.outputs.clear()
    first.outputs.extend(outputs)
    for domain, version in second.opset_imports.items():
        first.opset_imports[domain] = max(version, first.opset_imports.get(domain, version))
    return VisionGraph(encoder.model, (*encoder.groups, *projector.groups), (*encoder.kept, *projector.kept))


def _as_rows(graph: ir.Graph, given: ir.Value, wanted: ir.Value) -> ir.Value:
    """The value `given` of `graph` with the dimensions of `wanted`: rows where the one has more of them."""
    if given.shape is None or wanted.shape is None or len(given.shape) == len(wanted.shape):
        return given
    (width,) = (int(str(dim)) for dim in wanted.shape[1:])
    shape = ir.tensor([-1, width], dtype=ir.DataType.INT64, name=f"{given.name}.rows")
    sizes = ir.Value(
        name=shape.name, type=ir.TensorType(shape.dtype), shape=ir.Shape([len(wanted.shape)]), const_value=shape
    )
    graph.register_initializer(sizes)
    step = _step("Reshape", [given, sizes], {}, given.dtype)
    step.outputs[0].name = f"{given.name}.0"
    graph.append(step)
    return step.outputs[0]


def _prefix_names(graph: ir.Graph, weights: set[int]) -> None:
    """Names of a graph's own values, nodes and constants, so that no other graph has them; weights keep theirs."""
    fixed = {id(value) for value in (*graph.inputs, *graph.outputs)} | weights
    constants = [v for v in graph.initializers.values() if id(v) not in fixed]
    for value in constants:
        graph.initializers.pop(str(value.name))
        value.name = f"projector.{value.name}"
        graph.register_initializer(value)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.name = f"projector.{node.name}"
        for value in node.outputs:
            if id(value) not in fixed:
                value.name = f"projector.{value.name}"


def _as_client_feeds(graph: ir.Graph, family: WebFamily) -> None:
    """Inputs by the client's names and types, with a batch of prompts where the graph takes the pictures of one."""
    wanted = []
    for value in list(graph.inputs):
        dims = list(value.shape or ())
        batched = len(dims) > _PROMPT_DIMS and dims[0] == 1 and str(dims[1]) == _PICTURES
        kind = ir.DataType.BOOL if value.name in family.masks else value.dtype
        name = family.inputs.get(str(value.name), str(value.name))
        if kind is None or not (batched or kind != value.dtype or name != value.name):
            wanted.append(value)
            continue
        sizes = [d if isinstance(d, int) else str(d) for d in dims]
        fed = typed_value(name, kind, [_BATCH, *sizes[1:]] if batched else sizes)
        inner = str(value.name) if name != value.name else f"{value.name}.one_prompt"
        _lead(graph, fed, value, inner, batched)
        wanted.append(fed)
    graph.inputs.clear()
    graph.inputs.extend(wanted)


def _lead(graph: ir.Graph, fed: ir.Value, value: ir.Value, name: str, batched: bool) -> None:
    """Let what reads the input `value` read `fed` instead, cast and with its prompts in one row of pictures."""
    steps: list[ir.Node] = []
    current = fed
    if batched:  # 0 keeps a dimension, -1 takes what is left: prompts times pictures
        rank = len(fed.shape or ())
        shape = ir.tensor([1, -1, *[0] * (rank - _PROMPT_DIMS)], dtype=ir.DataType.INT64, name=f"{fed.name}.row")
        row = ir.Value(name=shape.name, type=ir.TensorType(shape.dtype), shape=ir.Shape([rank]), const_value=shape)
        graph.register_initializer(row)
        steps.append(_step("Reshape", [current, row], {}, fed.dtype))
        current = steps[-1].outputs[0]
    if value.dtype is not None and fed.dtype != value.dtype:
        steps.append(_step("Cast", [current], {"to": int(value.dtype)}, value.dtype))
        current = steps[-1].outputs[0]
    for index, step in enumerate(steps):
        step.outputs[0].name = f"{name}.{index}"
    if value.uses():
        graph.insert_before(graph[0], steps)
        ir.convenience.replace_all_uses_with(value, current)


def _step(operator: str, inputs: Sequence[ir.Value], attributes: dict[str, int], kind: ir.DataType | None) -> ir.Node:
    node = ir.node(operator, list(inputs), attributes)
    if kind is not None:
        node.outputs[0].dtype = kind
    return node


def _give(graph: ir.Graph, kind: ir.DataType) -> None:
    """Let the graph's one output be of the type `kind`."""
    (features,) = graph.outputs
    if features.dtype == kind:
        return
    features.name = f"{_FEATURES}.float32"
    narrow = _step("Cast", [features], {"to": int(kind)}, kind)
    narrow.outputs[0].name, narrow.outputs[0].shape = _FEATURES, features.shape
    graph.append(narrow)
    graph.outputs[0] = narrow.outputs[0]
