"""The table of ``vlmexport families`` is what is measured, and the README's table is that table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from tests.zoo import measure
from tests.zoo.measure import FAMILIES, ONNX_LIMIT, prove
from vlmexport.cli.main import run
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import VLM
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.support import STATES, TARGETS, support_markdown, support_table

ROOT = Path(__file__).parent.parent.parent
Capture = pytest.CaptureFixture[str]


def test_the_table_has_every_family_and_target_and_a_reason_for_each_refusal() -> None:
    table = support_table()
    assert [(entry.family, entry.target) for entry in table] == [(f, t) for f in FAMILIES for t in TARGETS]
    assert {entry.state for entry in table} <= STATES.keys()
    assert all(entry.reason for entry in table if entry.state == "refused")


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = text.split("<!-- families -->\n", 1)[1].split("<!-- /families -->", 1)[0]
    assert inside == support_markdown(support_table()), "run `make docs`"


def test_the_command_prints_states_and_reasons(capsys: Capture, tmp_path: Path) -> None:
    report = tmp_path / "families.json"
    assert run(["families", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert all(family in printed for family in FAMILIES)
    assert len(json.loads(report.read_text())["families"]) == len(FAMILIES) * len(TARGETS)
    assert run(["families", "lava"]) == 2
    assert "known: llava" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl"])
def test_a_family_that_the_plan_refuses_is_not_verified_in_llama_cpp(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise UnsupportedModelError("nothing goes")

    monkeypatch.setattr(measure, "plan_gguf", refused)
    assert measure.gguf_verdict(family, cast("VLM", None)) == {"state": "refused", "reason": "nothing goes"}


@pytest.mark.slow
@pytest.mark.family
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_measured(family: str, tmp_path: Path) -> None:
    listed = {e.target: {"state": e.state, "reason": e.reason} for e in support_table() if e.family == family}
    proof = prove(family, tmp_path)
    assert proof.verdicts == listed
    if proof.int4 is None or proof.replay is None or proof.image is None:
        assert listed["onnx"]["state"] == "refused"
        return
    assert proof.replay <= REPLAY_LIMIT
    rounded, original = proof.int4
    assert rounded <= ONNX_LIMIT < original
    assert proof.image > 10 * ONNX_LIMIT
