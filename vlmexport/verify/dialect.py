"""Does every graph of the ``tensorrt`` layout keep to standard operators? Judged from the files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmexport.manifest import Artifact
from vlmexport.target import load_target
from vlmexport.verify.gates import Gate

CHECK = "model/dialect"
_STANDARD = ("", "ai.onnx")


def check_dialect(gate: Gate, artifact: Artifact) -> None:
    """``model/dialect``: operators of the standard domain alone, in the target's opset, and no functions.

    The check names the first part that has a fault.
    """
    opset = load_target(artifact.manifest.target).onnx.opset
    part, faults = "model", list[str]()
    for name in artifact.manifest.parts:
        with gate.guard(CHECK, name, "lowering"):
            found = dialect_faults(artifact.part_path(name), opset)
            part = name if found and not faults else part
            faults += [f"{name}: {fault}" for fault in found]
    gate.verdict(CHECK, part, "lowering", faults, "faults")


def dialect_faults(path: Path, opset: int) -> list[str]:
    """What in the graph at `path` is not the standard operators of `opset`; weights are not read."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    faults = [f"{f.name} is a function" for f in model.functions]
    faults += [f"{n.op_type} is {n.domain}'s (node {n.name})" for n in _nodes(model.graph) if n.domain not in _STANDARD]
    versions = [o.version for o in model.opset_import if o.domain in _STANDARD]
    return faults if versions == [opset] else [*faults, f"opset {versions}, expected {opset}"]


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
