"""Every family of the zoo by name: how its tiny checkpoint is made, and the inputs that it is proven on.

A module with families of its own has ``ENTRIES`` and a place in `_MODULES`.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

from tests.zoo import gemma, qwen
from tests.zoo.entry import Entry, Example
from tests.zoo.models import ZOO, make_zoo, zoo_examples
from vlmexport.model.load import VLM, load_vlm

_MODULES: tuple[str, ...] = ("cross", "hybrid", "moe", "more", "places", "ple", "survey_a", "survey_b")


@functools.cache
def entries() -> dict[str, Entry]:
    """All families, in the order of their names."""
    found = {family: _entry_of_zoo(family) for family in ZOO}
    found |= {family: _entry_of_gemma(family) for family in gemma.FAMILIES}
    found |= {family: _entry_of_qwen(family) for family in qwen.FAMILIES}
    for name in _MODULES:
        more: dict[str, Entry] = importlib.import_module(f"tests.zoo.{name}").ENTRIES
        assert not found.keys() & more.keys(), f"{name} has families that are there already"
        found |= more
    return dict(sorted(found.items()))


def make(family: str, folder: Path) -> tuple[VLM, tuple[Example, ...]]:
    """The tiny checkpoint of `family`, written to `folder` and loaded, and its examples."""
    entry = entries()[family]
    vlm = load_vlm(str(entry.make(folder)))
    return vlm, entry.examples(vlm)


def _entry_of_zoo(family: str) -> Entry:
    return Entry(
        make=lambda folder: make_zoo(family, folder),
        examples=lambda vlm: zoo_examples(family, vlm.model, vlm.facts.image_token_id),
    )


def _entry_of_gemma(family: str) -> Entry:
    return Entry(
        make=lambda folder: gemma.make_gemma(family, folder),
        examples=lambda vlm: gemma.gemma_examples(family, vlm.facts.image_token_id),
    )


def _entry_of_qwen(family: str) -> Entry:
    return Entry(make=lambda folder: qwen.make_qwen(family, folder), examples=qwen.prompts)
