"""Which families export to which target: measured by the tests on tiny checkpoints, and kept as data.

``families/support.json`` is written by ``tools/measure_families.py``; a test measures every entry again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Literal, TypeAlias

TARGETS = ("onnx", "tensorrt", "gguf")
SUPPORT_NAME = "support.json"
State: TypeAlias = Literal["verified", "differs", "runs", "refused", "unproven"]
STATES: dict[State, str] = {
    "verified": "a tiny checkpoint of it is exported and gives PyTorch's numbers in the real runtime",
    "differs": "it is exported and runs, and its numbers are further from PyTorch's than the limit",
    "runs": "it is exported and runs, and its numbers were not compared with PyTorch's",
    "refused": "the export stops, with the reason",
    "unproven": "nothing refuses it, and no test runs it",
}


@dataclass(frozen=True)
class Support:
    """One family on one target; `reason` says why it is refused, or what is left out (empty for none)."""

    family: str
    target: str
    state: State
    reason: str


def support_table() -> tuple[Support, ...]:
    """All entries, families in alphabetical order, targets in the order of `TARGETS`."""
    text = resources.files("vlmexport.families").joinpath(SUPPORT_NAME).read_text(encoding="utf-8")
    found: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return tuple(
        Support(family, target, found[family][target]["state"], found[family][target]["reason"])  # type: ignore[arg-type]
        for family in sorted(found)
        for target in TARGETS
    )


def support_markdown(table: Iterable[Support]) -> str:
    """The table as markdown; reasons follow as a list, each once with the families that it holds for."""
    entries = list(table)
    lines = [f"| family | {' | '.join(TARGETS)} |", f"|---|{'---|' * len(TARGETS)}"]
    for family in dict.fromkeys(entry.family for entry in entries):
        states = {entry.target: entry.state for entry in entries if entry.family == family}
        lines.append(f"| {family} | {' | '.join(states[target] for target in TARGETS)} |")
    return "\n".join(lines) + "\n"
