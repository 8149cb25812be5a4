"""A traced decoder cut at its layer brackets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.neutral import DOMAIN


@dataclass(frozen=True)
class Regions:
    """A traced graph cut at its brackets: nodes before the layers, each kind's template, nodes after them."""

    before: list[ir.Node]
    templates: dict[int, list[ir.Node]]
    after: list[ir.Node]


def cut_regions(graph: ir.Graph, paths: Mapping[int, str] | None = None) -> Regions:
    """Cut `graph` at its layer brackets; refuses work between two layers, which a repetition would lose.

    `paths` are the whole-model paths of the traced layers: what reads a layer's parameter alone belongs to it as well.
    """
    kind_of = {v: kind for kind, path in (paths or {}).items() for v in graph.inputs if _below(v, path)}
    done: set[ir.Value] = set()
    _check_rotary(graph)
    regions = Regions([], {}, [])
    for node in graph:
        inside = {kind_of[v] for v in node.inputs if v in kind_of}
        if node.domain == DOMAIN and node.op_type == "LayerIn":
            source = node.inputs[0]
            if done and not _is_bracket(source, "LayerOut"):
                raise UnsupportedModelError("the decoder works between its layers; such layers cannot be repeated")
            kind = node.attributes["layer"].as_int()
            regions.templates.setdefault(kind, []).insert(0, node)
            kind_of.update(dict.fromkeys(node.outputs, kind))
            continue
        if len(inside) > 1:
            raise UnsupportedModelError("a decoder layer reads a value from inside another layer")
        if inside:
            kind = min(inside)
            regions.templates.setdefault(kind, []).append(node)
            leaves = node.domain == DOMAIN and node.op_type == "LayerOut"
            done.update(node.outputs if leaves else ())
            kind_of.update({} if leaves else dict.fromkeys(node.outputs, kind))
        elif any(v in done for v in node.inputs):
            regions.after.append(node)
            done.update(node.outputs)
        else:
            regions.before.append(node)
    return regions


def _check_rotary(graph: ir.Graph) -> None:
    """Refuse a trace in which rotated queries or keys reach attention through something else."""
    for node in graph:
        if node.domain != DOMAIN or node.op_type != "Rotary":
            continue
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if any((reader.domain, reader.op_type) != (DOMAIN, "Attention") for reader in readers):
            raise UnsupportedModelError(
                "the decoder changes queries or keys after their rotary embedding; use --attention standard"
            )


def _is_bracket(value: ir.Value | None, op: str) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.domain == DOMAIN and node.op_type == op


def _below(value: ir.Value, path: str) -> bool:
    return str(value.name).startswith(f"{path}.")
