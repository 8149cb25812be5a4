"""Plan files: exact round trip, strict reading, the model they belong to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions
from vlmexport.plan_file import AutoLimit, QuantPlan, load_plan_file, model_fingerprint
from vlmexport.quantize.scheme import make_scheme

NAME = "model.text_model.layers.0.self_attn.q_proj.weight"


def plan() -> QuantPlan:
    base = make_scheme("rtn", 4)
    return QuantPlan(
        "Idefics3ForConditionalGeneration",
        model_fingerprint(model_dir()),
        dataclasses.replace(base, overrides={NAME: make_scheme("rtn", 8)}),
        ("lm_head.weight",),
        {"max_kl": 0.1},
        {"kl": 0.05},
        {
            "kl": 0.04,
            "upper": 0.06,
            "answer_kl": 0.01,
            "samples": 3,
            "tokens": 9,
            "bytes": 5,
            "weights_by_choice": {"4 bits g32": 1, "8 bits g128": 1},
        },
        {"recipe": {}},
    )


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    found = load_plan_file(tmp_path / "plan.json")
    assert found == plan()
    assert found.scheme.for_weight(NAME).bits == 8
    assert found.scheme.for_weight(NAME.replace("q_proj", "k_proj")).bits == 4
    assert any("decoder weights: 4 bits g32 (1), 8 bits g128 (1); " in line for line in found.lines())


def test_apply_adds_to_what_is_kept() -> None:
    options = plan().apply(OnnxOptions(keep=("*.layers.1.*", "lm_head.weight"), attention="standard"))
    assert options.keep == ("*.layers.1.*", "lm_head.weight")
    assert options.scheme == plan().scheme
    assert options.attention == "standard"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "other"}, "not a quantization plan"),
        ({"version": 2}, "version 2; this vlmexport reads 1"),
        ({"bits": 4}, r"missing keys \[\], unknown keys \['bits'\]"),
        ({"keep": None}, "keep must be a list"),
        ({"measured": {"kl": 0.1}}, r"measured lacks \['answer_kl', 'bytes',"),
        ({"measured": {**plan().measured, "bytes": "5"}}, "measured holds other things than numbers"),
        ({"measured": {**plan().measured, "weights_by_choice": [1]}}, "measured holds other things than numbers"),
        ({"keep": [3]}, "keep must be a list"),
        ({"fingerprint": 3}, "architecture and fingerprint must be texts"),
        ({"scheme": {"bits": 5}}, "bits is 5"),
        ({"scheme": {"bit": 4}}, "unknown keys"),
        ({"scheme": {"bits": "4"}}, "bits is '4'; it must be of type int"),
        ({"scheme": {"overrides": ["a"]}}, "overrides is"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({**plan().to_dict(), **change}))
    with pytest.raises(BadInputError, match=fault):
        load_plan_file(tmp_path / "plan.json")


def test_missing_keys_and_files_are_refused(tmp_path: Path) -> None:
    data = plan().to_dict()
    del data["keep"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(BadInputError, match=r"missing keys \['keep'\]"):
        load_plan_file(tmp_path / "plan.json")
    with pytest.raises(BadInputError, match="No such file"):
        load_plan_file(tmp_path / "gone.json")
    (tmp_path / "text.json").write_text("plan")
    with pytest.raises(BadInputError, match="not valid JSON"):
        load_plan_file(tmp_path / "text.json")


def test_a_plan_is_for_one_model(tiny_llava: Path, tiny_idefics3: Path) -> None:
    plan().check(load_vlm("demo"))
    with pytest.raises(BadInputError, match=r"made for a Idefics3ForConditionalGeneration, .* is a Llava"):
        plan().check(load_vlm(str(tiny_llava)))
    with pytest.raises(BadInputError, match="made for other weights"):
        plan().check(load_vlm(str(tiny_idefics3)))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_kl": 1.0, "max_size": 5},
        {"max_kl": 0.0},
        {"max_size": -3},
        {"max_kl": float("inf")},
        {"max_kl": float("nan")},
    ],
)
def test_a_limit_is_one_positive_number(values: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="--quant auto"):
        AutoLimit(**values)
