"""Trace one of several alike layers and repeat it: within a trace, and afterwards in the graph.

The first layer of each kind is traced between two brackets; every later one that is called alike emits a single
``Repeat`` node, which `expand_repeats` replaces by a copy of the bracketed nodes with the weights of that layer. What
surrounds the layers (a choice of hidden states, say) sees every layer and needs no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.split.layers import layer_kinds, overridden
from vlmexport.split.names import module_path

_MIN_LAYERS = 3


@dataclass
class Repeats:
    """The layers of one trace: `paths` are their whole-model paths, `kinds` the index of each layer's template."""

    paths: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


@contextmanager
def repeated_layers(model: nn.Module, root: nn.Module) -> Iterator[Repeats]:
    """Within, a call of a layer below `root` that is like an earlier one emits one ``Repeat`` node."""
    repeats = Repeats()
    with ExitStack() as stack:
        for layers in _layer_lists(root):
            offset = len(repeats.paths)
            repeats.kinds += [offset + kind for kind in _kinds(layers)]
            repeats.paths += [module_path(model, layer) for layer in layers]
            templates: dict[int, _Call] = {}
            for index, layer in enumerate(layers, start=offset):
                stack.enter_context(overridden(layer, _forward(layer, index, repeats.kinds[index], templates)))
        yield repeats


def expand_repeats(graph: ir.Graph, repeats: Repeats, parameters: Mapping[str, torch.Tensor]) -> None:
    """Replace every ``Repeat`` node by its template's nodes; new weights join the graph's inputs.

    Weights must be graph inputs named by their whole-model name; `parameters` tells their shapes.
    """
    values = {str(v.name): v for v in graph.inputs}
    regions: dict[int, _Region] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "Repeat":
            kind, layer = node.attributes["kind"].as_int(), node.attributes["layer"].as_int()
            if kind not in regions:
                regions[kind] = _find_region(graph, kind, repeats.paths[kind])
            paths = (repeats.paths[kind], repeats.paths[layer])
            _copy_region(graph, node, regions[kind], _renamed(graph, values, paths, parameters), paths)
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in ("LayerIn", "LayerOut") and node.inputs[0] is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)


@dataclass(frozen=True)
class _Call:
    """How a template was called: everything but the hidden state, to compare later calls with."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    returns_tuple: bool

    def equals(self, spec: pytree.TreeSpec, leaves: tuple[Any, ...]) -> bool:
        if spec != self.spec:
            return False
        return all(a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(self.leaves, leaves, strict=True))


@dataclass(frozen=True)
class _Region:
    """The nodes between the brackets of layer `kind`, in order, with its input and its result."""

    nodes: tuple[ir.Node, ...]
    start: ir.Value
    end: ir.Value


def _layer_lists(root: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of layers below `root` in which something repeats."""
    found: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside and len(module) >= _MIN_LAYERS:
            found.append(module)
            inside.update(id(m) for m in module.modules())
    return found


def _kinds(layers: nn.ModuleList) -> list[int]:
    """For each layer the first layer like it; a layer with other buffers than its template stands for itself."""
    kinds = []
    for index, kind in enumerate(layer_kinds(layers)):
        mine, template = dict(layers[index].named_buffers()), dict(layers[kind].named_buffers())
        alike = mine.keys() == template.keys() and all(torch.equal(mine[k], template[k]) for k in mine)
        kinds.append(kind if alike else index)
    return kinds


def _forward(layer: nn.Module, index: int, kind: int, templates: dict[int, _Call]) -> Callable[..., Any]:
    forward = layer.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        template = templates.get(kind)
        if template is not None and template.equals(spec, tuple(leaves)):
            repeated = _emit("Repeat", hidden, {"layer": index, "kind": kind})
            return (repeated,) if template.returns_tuple else repeated
        if index != kind:
            return forward(hidden, *args, **kwargs)
        out = forward(_emit("LayerIn", hidden, {"layer": index}), *args, **kwargs)
        result = out[0] if isinstance(out, tuple) and len(out) == 1 else out
        if not isinstance(result, torch.Tensor) or result.shape != hidden.shape:
            return out
        templates[kind] = _Call(spec, tuple(leaves), isinstance(out, tuple))
        result = _emit("LayerOut", result, {"layer": index})
        return (result,) if isinstance(out, tuple) else result

    def positional(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) if args and isinstance(args[0], torch.Tensor) else forward(*args, **kwargs)

    return positional


def _emit(op: str, x: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{op}", [x], attributes, dtype=x.dtype, shape=list(x.shape), version=1)


def _find_region(graph: ir.Graph, kind: int, path: str) -> _Region:
    """Everything that depends on the bracket's input or on the layer's weights, up to the closing bracket."""
    inside = {v for v in graph.inputs if str(v.name).startswith(f"{path}.")}
    nodes: list[ir.Node] = []
    start: ir.Value | None = None
    for node in graph:
        if node.domain == DOMAIN and node.op_type == "LayerIn" and node.attributes["layer"].as_int() == kind:
            start = node.outputs[0]
            inside.add(start)
        elif node.domain == DOMAIN and node.op_type == "LayerOut" and node.attributes["layer"].as_int() == kind:
            if start is None or node.inputs[0] is None:
                break
            return _Region(tuple(nodes), start, node.inputs[0])
        elif any(v in inside for v in node.inputs):
            nodes.append(node)
            inside.update(node.outputs)
    raise ValueError(f"the trace has no bracketed layer {path}")


def _renamed(
    graph: ir.Graph, values: dict[str, ir.Value], paths: tuple[str, str], parameters: Mapping[str, torch.Tensor]
) -> dict[ir.Value, ir.Value]:
    """For each weight of the template's layer the same weight of another layer, made where there is none yet."""
    template, layer = paths
    found: dict[ir.Value, ir.Value] = {}
    for name in [n for n in values if n.startswith(f"{template}.")]:
        other = layer + name.removeprefix(template)
        if other not in values:
            shape = ir.Shape(parameters[other].shape)
            values[other] = ir.Value(name=other, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
            graph.inputs.append(values[other])
        found[values[name]] = values[other]
    return found


def _copy_region(
    graph: ir.Graph, place: ir.Node, region: _Region, new: dict[ir.Value, ir.Value], paths: tuple[str, str]
) -> None:
    """Put the region, with the values of `new`, in front of `place`; paths in its attributes become the layer's."""
    layer = place.attributes["layer"].as_int()
    if place.inputs[0] is None:
        raise ValueError("a repeated layer has no input")
    new[region.start] = place.inputs[0]
    for node in region.nodes:
        inputs = [None if v is None else new.get(v, v) for v in node.inputs]
        outputs = [ir.Value(name=f"{v.name}.{layer}", type=v.type, shape=v.shape) for v in node.outputs]
        attributes = [_moved(a, *paths) for a in node.attributes.values()]
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs)
        graph.insert_before(place, copy)
        new.update(zip(node.outputs, outputs, strict=True))
    ir.convenience.replace_all_uses_with(place.outputs[0], new[region.end], replace_graph_outputs=True)
    graph.remove(place, safe=True)


def _moved(attribute: ir.Attr, template: str, layer: str) -> ir.Attr:
    """`attribute`, or the path of the layer's own module where it names one of the template's."""
    if attribute.type != ir.AttributeType.STRING or not attribute.as_string().startswith(f"{template}."):
        return attribute
    return ir.AttrString(attribute.name, layer + attribute.as_string().removeprefix(template))
