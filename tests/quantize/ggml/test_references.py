"""Our types, order and bytes against files that llama-quantize wrote (tools/make_gguf_references.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quantize.ggml.sources import Run, Source, all_sources
from vlmexport.quantize.ggml.blocks import quantize_rows
from vlmexport.quantize.ggml.library import LLAMA_CPP_BUILD
from vlmexport.quantize.ggml.mix import MixFacts, choose_types, tensor_order

FOLDER = Path(__file__).parent / "references"
SOURCES = {source.name: source for source in all_sources()}
# Their quantizers build code books when first used, which takes seconds each.
SLOW_TO_START = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")

# These have nothing but types of their own to show; one tensor of each type is enough.
TYPES_ONLY = ("ungrouped", "sixteen-experts", "seventy")

every_case = [pytest.param(s.name, run, id=f"{s.name}-{run.key}") for s in SOURCES.values() for run in s.runs]


@cache
def reference(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return data


def expected(source: Source, run: Run) -> dict[str, list[str]]:
    """``name: [type, hash]`` in the order of llama-quantize's file."""
    made = reference(source.name)
    entries = made["runs"][run.key].split(" | ")
    return {name: entry.split() for name, entry in zip(made["order"], entries, strict=True)}


def types(source: Source, run: Run, facts: MixFacts | None = None) -> dict[str, str]:
    chosen = choose_types(
        source.tensors,
        run.quant,
        facts or source.facts,
        half=source.half,
        overrides=run.overrides,
        with_imatrix=run.imatrix,
        compatible=True,
    )
    return {name: choice.type for name, choice in chosen.items()}


def digest(source: Source, name: str, kind: str, run: Run, swapped: str = "") -> str:
    values = source.values(name)
    importance = source.importance(swapped or name) if run.imatrix else None
    matrices = values if values.ndim == 3 else values.reshape(1, -1, values.shape[-1])
    weights = [None] * len(matrices) if importance is None else list(np.atleast_2d(importance))
    if kind in ("F32", "F16"):
        matrices, weights = values.reshape(1, 1, -1), [None]
    made = hashlib.sha256()
    for matrix, weight in zip(matrices, weights, strict=True):
        made.update(quantize_rows(matrix, kind, weight, threads=1).tobytes())
    return made.hexdigest()[:12]


@pytest.mark.parametrize(("name", "run"), every_case)
def test_types_and_order_are_llama_quantizes(name: str, run: Run) -> None:
    source = SOURCES[name]
    wanted = expected(source, run)

    assert tensor_order(source.shapes) == list(wanted)
    assert types(source, run) == {tensor: kind for tensor, (kind, _) in wanted.items()}


def check_bytes(source: Source, run: Run, tensors: Iterable[str]) -> None:
    wanted = expected(source, run)
    different = [t for t in tensors if digest(source, t, wanted[t][0], run) != wanted[t][1]]
    assert not different, f"{len(different)} tensors differ: {different[:5]}"


def sample(wanted: dict[str, list[str]]) -> list[str]:
    """A small tensor of every type whose quantizer starts at once."""
    last = {kind: name for name, (kind, _) in wanted.items() if kind not in SLOW_TO_START and name[:3] != "tok"}
    return list(last.values())


@pytest.mark.parametrize(("name", "run"), every_case)
def test_bytes_of_one_tensor_of_each_type_are_llama_quantizes(name: str, run: Run) -> None:
    check_bytes(SOURCES[name], run, sample(expected(SOURCES[name], run)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), [case for case in every_case if case.values[0] not in TYPES_ONLY])
def test_bytes_of_every_tensor_are_llama_quantizes(name: str, run: Run) -> None:
    check_bytes(SOURCES[name], run, SOURCES[name].shapes)


def test_references_are_of_the_pinned_llama_cpp() -> None:
    assert {reference(name)["made_by"] for name in SOURCES} == {f"llama-quantize {LLAMA_CPP_BUILD}"}
    assert {file.stem for file in FOLDER.glob("*.json")} == set(SOURCES)
    assert sum(file.stat().st_size for file in FOLDER.glob("*.json")) < 400_000


def test_facts_are_read_where_llama_quantize_reads_them() -> None:
    for source in SOURCES.values():
        if source.half == "text":
            metadata = {f"{source.facts.arch}.{key}": value for key, value in source.metadata.items()}
            assert MixFacts.of_metadata(source.facts.arch, metadata) == source.facts


def test_a_swapped_importance_changes_the_bytes() -> None:
    source, run = SOURCES["grouped"], Run("Q4_K_M", imatrix=True)
    _, known = expected(source, run)["blk.2.ffn_up.weight"]

    assert digest(source, "blk.2.ffn_up.weight", "Q4_K", run) == known
    assert digest(source, "blk.2.ffn_up.weight", "Q4_K", run, swapped="blk.3.ffn_up.weight") != known
    assert digest(source, "blk.2.ffn_up.weight", "Q4_K", replace(run, imatrix=False)) != known


def test_a_wrong_fact_changes_the_types() -> None:
    """The references tell the rules apart that depend on blocks, shared heads, experts and 70B."""
    wrong = {
        "grouped": ("Q4_K_M", {"layers": 15}),
        "convolutions": ("Q2_K", {"kv_heads": 2}),
        "eight-experts": ("Q4_K_M", {"experts": 0}),
        "sixteen-experts": ("Q4_K_M", {"experts": 0}),
        "seventy": ("Q3_K_S", {"arch": "mistral3"}),
    }
    for name, (quant, change) in wrong.items():
        source = SOURCES[name]
        wanted = {tensor: kind for tensor, (kind, _) in expected(source, Run(quant)).items()}
        assert types(source, Run(quant)) == wanted
        assert types(source, Run(quant), replace(source.facts, **change)) != wanted, name
    grouped = SOURCES["grouped"]
    wanted = {tensor: kind for tensor, (kind, _) in expected(grouped, Run("Q2_K")).items()}
    assert types(grouped, Run("Q2_K"), replace(grouped.facts, kv_heads=4)) != wanted
