"""Rules of the lint for what a graph is fed: inputs, outputs, initializers, optimization profiles and external data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from onnx import TensorProto

from vlmexport.engines import Dims, ShapeProfile
from vlmexport.lower.tensorrt import operators
from vlmexport.lower.tensorrt.lint_view import GraphRule, Problem, Request, all_sites, subgraphs, type_name


def values(request: Request) -> Iterator[tuple[str, Problem]]:
    """Inputs and outputs: tensors with a name, of a type and a rank that TensorRT has."""
    graph = request.model.graph
    for kind, group in (("input", graph.input), ("output", graph.output)):
        for index, value in enumerate(group):
            name = value.name or f"{kind} {index}"
            if not value.name:
                yield name, Problem("error", f"{kind} {index} has no name", "name it")
            if not value.type.HasField("tensor_type"):
                yield name, Problem("error", f"the {kind} {name} is no tensor", "use plain tensors")
                continue
            tensor = value.type.tensor_type
            yield from _typed(name, tensor.elem_type, f"the {kind} {name}")
            if len(tensor.shape.dim) > operators.MAX_RANK:
                problem = f"the {kind} {name} has {len(tensor.shape.dim)} dimensions, TensorRT at most 8"
                yield name, Problem("error", problem, "merge some of them")
            if kind == "input" and not tensor.HasField("shape"):
                yield name, Problem("warning", f"the input {name} has no known rank", "declare its shape")


def initializers(request: Request) -> Iterator[tuple[str, Problem]]:
    """Initializers of a type that TensorRT has, also those that nothing reads."""
    for tensor in _tensors(request.model.graph):
        yield from _typed(tensor.name, tensor.data_type, f"the initializer {tensor.name}")


def _typed(name: str, dtype: int, what: str) -> Iterator[tuple[str, Problem]]:
    if dtype not in operators.READ_TYPES:
        yield name, Problem("error", f"{what} is {type_name(dtype)}, which TensorRT has not", "use INT32 or FLOAT16")
    elif dtype == TensorProto.DOUBLE:
        yield name, Problem("warning", f"{what} is DOUBLE, which TensorRT computes in FP32", "use FLOAT")


def types(request: Request) -> Iterator[tuple[str, Problem]]:
    """Operands whose types do not fit together; ONNX's own inference names the first node."""
    try:
        onnx.shape_inference.infer_shapes(request.model, check_type=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        line = " ".join(str(error).split())
        yield "graph", Problem("error", f"the types do not fit: {line}", "put a Cast in between")


def profile_shapes(request: Request) -> Iterator[tuple[str, Problem]]:
    """Every profile gives every dynamic input its range, and nothing that is not in the graph."""
    held = {t.name for t in request.model.graph.initializer}
    inputs = {i.name: i.type.tensor_type for i in request.model.graph.input if i.name not in held}
    for profile in request.profiles:
        for name in sorted(profile.shapes.keys() - inputs.keys()):
            problem = f"profile {profile.name} has a shape for {name}, which is no input of the graph"
            yield name, Problem("error", problem, f"the inputs are {', '.join(inputs)}")
        for name, tensor in inputs.items():
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            yield from ((name, problem) for problem in _profiled(profile, name, dims))


def _profiled(profile: ShapeProfile, name: str, dims: list[int]) -> Iterator[Problem]:
    if name not in profile.shapes:
        if -1 in dims:
            reason = f"profile {profile.name} has no range for the dynamic axes of {name} {dims}"
            yield Problem("error", reason, "give its smallest, usual and largest shape")
        return
    smallest, usual, largest = profile.shapes[name]
    for shape in (smallest, usual, largest):
        if len(shape) != len(dims) or any(d not in (-1, s) for d, s in zip(dims, shape, strict=False)):
            yield Problem(
                "error", f"profile {profile.name} gives {name} {list(shape)}, the graph {dims}", "follow the graph"
            )
            return
    if not _ordered(smallest, usual) or not _ordered(usual, largest):
        reason = f"profile {profile.name} gives {name} no rising range: {smallest}, {usual}, {largest}"
        yield Problem("error", reason, "give smallest <= usual <= largest")


def _ordered(low: Dims, high: Dims) -> bool:
    return all(a <= b for a, b in zip(low, high, strict=True))


def external_data(request: Request) -> Iterator[tuple[str, Problem]]:
    """External data that is missing, outside of the graph's folder, or shorter than the tensor says."""
    folder = request.folder.resolve()
    for tensor in _tensors(request.model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        leaves = f"the data of {tensor.name} is in {location!r}, outside of the graph's folder"
        path = folder / location
        absolute = any(kind(location).is_absolute() for kind in (PurePosixPath, PureWindowsPath))
        if not location or absolute or not path.resolve().is_relative_to(folder):
            yield tensor.name, Problem("error", leaves, "keep the data beside the graph")
        elif not path.is_file():
            yield tensor.name, Problem("error", f"the data file {location} is missing", "copy it beside the graph")
        else:
            end = sum(int(entries[key]) for key in ("offset", "length") if entries.get(key, "").isdecimal())
            size = path.stat().st_size
            if end > size:
                reason = f"the data of {tensor.name} ends at byte {end}, {location} has {size}"
                yield tensor.name, Problem("error", reason, "copy the whole file")


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph and of its subgraphs, and the values of its Constant nodes."""
    yield from message.initializer
    for node in message.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_location == TensorProto.EXTERNAL:
                yield attribute.t
            for graph in subgraphs(attribute):
                yield from _tensors(graph)


def unnamed_nodes(request: Request) -> Iterator[tuple[str, Problem]]:
    """Two nodes of one name, between which no message can tell."""
    seen: set[str] = set()
    for site in all_sites(request):
        name = site.node.name
        if name and name in seen:
            yield name, Problem("warning", f"two nodes are called {name}", "name every node once")
        seen.add(name)


GRAPH_RULES = (
    GraphRule("value", values),
    GraphRule("initializer", initializers),
    GraphRule("types", types),
    GraphRule("profile", profile_shapes),
    GraphRule("external-data", external_data),
    GraphRule("node-name", unnamed_nodes),
)
