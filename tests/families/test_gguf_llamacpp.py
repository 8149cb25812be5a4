"""Tiny checkpoints of every family, exported at F16 and run on a picture in llama.cpp, against PyTorch in FP32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.cases_gguf import CASES, Case, run_case
from tests.families.gguf_proof import KL_LIMIT
from vlmexport.families import gguf_idefics3, gguf_internvl, gguf_llama, gguf_llava, gguf_pixtral
from vlmexport.model.family import GgufHalf, TensorRule, Transform

pytestmark = pytest.mark.slow
EMBEDDING_LIMIT = 2e-3  # F16 weights, and ggml's table of GELU

Change = Callable[[GgufHalf], GgufHalf]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_family_in_llamacpp_equals_pytorch(case: Case, tmp_path: Path) -> None:
    proof = run_case(case, tmp_path)
    assert proof.images > 0
    assert proof.embeddings <= EMBEDDING_LIMIT
    assert proof.worst <= KL_LIMIT


def _rules(half: GgufHalf, change: Callable[[TensorRule], TensorRule]) -> GgufHalf:
    return dataclasses.replace(half, rules=tuple(map(change, half.rules)))


def _as_it_stands(end: str) -> Change:
    """A half whose rule for sources that end so moves nothing."""

    def change(rule: TensorRule) -> TensorRule:
        return dataclasses.replace(rule, transform=None) if rule.source.endswith(end) else rule

    return lambda half: _rules(half, change)


def _swapped(first: str, second: str) -> Change:
    """A half in which two targets are taken for each other."""
    other = {first: second, second: first}

    def change(rule: TensorRule) -> TensorRule:
        return dataclasses.replace(rule, targets=tuple(other.get(t, t) for t in rule.targets))

    return lambda half: _rules(half, change)


def _wrong_heads(half: GgufHalf) -> GgufHalf:
    def change(rule: TensorRule) -> TensorRule:
        turned = rule.source.endswith("k_proj")
        return dataclasses.replace(rule, transform=Transform("permute", (1,))) if turned else rule

    return _rules(half, change)


def _with(**keys: Any) -> Change:
    own = {key.replace("__", "."): value for key, value in keys.items()}
    return lambda half: dataclasses.replace(half, metadata={**half.metadata, **own})


def _without_computed(half: GgufHalf) -> GgufHalf:
    return dataclasses.replace(half, computed={})


def _other_row(half: GgufHalf) -> GgufHalf:
    (rule,) = half.borrowed
    return dataclasses.replace(half, borrowed=(dataclasses.replace(rule, transform=Transform("row", (7 + 100,))),))


def _padded(half: GgufHalf) -> GgufHalf:
    kept = {key: value for key, value in half.metadata.items() if not key.endswith("image_grid_pinpoints")}
    return dataclasses.replace(half, metadata=kept)


BY_FAMILY: dict[str, Case] = {case.family: case for case in reversed(CASES)}
LLAMA3 = next(case for case in CASES if case.text.get("rope_parameters", {}).get("rope_type") == "llama3")
FAULTS = {
    "queries not permuted": (BY_FAMILY["smolvlm"], gguf_llama, "text", _as_it_stands("q_proj")),
    "keys permuted as one head": (BY_FAMILY["smolvlm"], gguf_llama, "text", _wrong_heads),
    "gate and up swapped": (BY_FAMILY["smolvlm"], gguf_llama, "text", _swapped("blk.{i}.ffn_gate", "blk.{i}.ffn_up")),
    "norms swapped": (BY_FAMILY["smolvlm"], gguf_idefics3, "vision", _swapped("v.blk.{i}.ln1", "v.blk.{i}.ln2")),
    "Llama 3 factors left out": (LLAMA3, gguf_llama, "text", _without_computed),
    "another rotary base": (BY_FAMILY["smolvlm"], gguf_llama, "text", _with(llama__rope__freq_base=20000.0)),
    "one block less": (BY_FAMILY["llava"], gguf_llava, "vision", _with(clip__vision__feature_layer=[1])),
    "padded where SigLIP stretches": (BY_FAMILY["llava"], gguf_llava, "vision", _padded),
    "Pixtral not permuted": (BY_FAMILY["pixtral"], gguf_pixtral, "vision", _as_it_stands("q_proj")),
    "another break token": (BY_FAMILY["mistral3"], gguf_pixtral, "vision", _other_row),
    "position table as it stands": (BY_FAMILY["internvl"], gguf_internvl, "vision", _as_it_stands("embeddings")),
    "layer scales swapped": (
        BY_FAMILY["internvl"],
        gguf_internvl,
        "vision",
        _swapped("v.blk.{i}.ls1.weight", "v.blk.{i}.ls2.weight"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_the_proof_red(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, module, name, change = FAULTS[fault]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(right(*args)))
    assert run_case(case, tmp_path).worst > 10 * KL_LIMIT
