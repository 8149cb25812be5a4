"""Wrong rules for negative tests: what a proof or a comparison must not let through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vlmexport.model.family import GgufHalf, TensorRule

Change = Callable[[GgufHalf], GgufHalf]


def changed_rules(change: Callable[[TensorRule], TensorRule]) -> Change:
    """A half whose rules went through `change`."""
    return lambda half: dataclasses.replace(half, rules=tuple(map(change, half.rules)))


def untouched(end: str) -> Change:
    """A half whose rules for sources that end so leave the values alone."""

    def change(rule: TensorRule) -> TensorRule:
        return dataclasses.replace(rule, transform=None) if rule.source.endswith(end) else rule

    return changed_rules(change)


def reversed_outputs(end: str) -> Change:
    """A half whose rules for sources that end so take their outputs for each other."""

    def change(rule: TensorRule) -> TensorRule:
        return dataclasses.replace(rule, targets=rule.targets[::-1]) if rule.source.endswith(end) else rule

    return changed_rules(change)


def swapped(first: str, second: str) -> Change:
    """A half in which two targets are taken for each other."""
    other = {first: second, second: first}

    def change(rule: TensorRule) -> TensorRule:
        return dataclasses.replace(rule, targets=tuple(other.get(target, target) for target in rule.targets))

    return changed_rules(change)


def with_keys(keys: dict[str, Any], *, text: bool = False) -> Change:
    """A half with other keys; `text`: those that a vision half adds to the text file."""
    field = "text_metadata" if text else "metadata"
    return lambda half: dataclasses.replace(half, **{field: {**getattr(half, field), **keys}})
