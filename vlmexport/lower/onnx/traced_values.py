"""Questions about the values of a traced graph: what made them, and how large they are."""

from __future__ import annotations

from typing import TypeVar

import onnx_ir as ir

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.neutral import DOMAIN

_T = TypeVar("_T")


def required(value: _T | None) -> _T:
    """`value`, which the traced graph must have."""
    if value is None:
        raise ValueError("a value of the traced graph is missing")
    return value


def static(value: ir.Value, axis: int) -> int:
    """The size of `axis`; raises `UnsupportedModelError` where it is not fixed."""
    size = required(value.shape)[axis]
    if not isinstance(size, int):
        raise UnsupportedModelError(f"attention input {value.name} has no fixed size on axis {axis}")
    return size


def unrotated(value: ir.Value) -> ir.Value:
    """What was marked as rotated, or `value` itself."""
    node = value.producer()
    marked = node is not None and node.domain == DOMAIN and node.op_type == "Rotary"
    return required(node.inputs[0]) if node is not None and marked else value


def linears_before(value: ir.Value | None) -> list[ir.Node]:
    """The Linears that `value` depends on through no other Linear."""
    found: list[ir.Node] = []
    waiting, seen = [value], set[ir.Node]()
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.domain == DOMAIN and node.op_type == "Linear":
            found.append(node)
        else:
            waiting.extend(node.inputs)
    return found


def linear_behind(value: ir.Value | None) -> ir.Node | None:
    """The Linear whose output `value` is, but for splitting it into heads ``[B, S, N*D] -> [B, N, S, D]``."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = required(transpose.inputs[0]).producer()
    if list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3] or reshape is None or reshape.op_type != "Reshape":
        return None
    linear = required(reshape.inputs[0]).producer()
    return linear if linear is not None and linear.domain == DOMAIN and linear.op_type == "Linear" else None
