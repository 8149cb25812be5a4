"""The tour of `vlmexport demo`, with the work itself replaced; the real one is `make demo`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmexport import api
from vlmexport.cli.main import run
from vlmexport.manifest import open_artifact
from vlmexport.pipeline import ExportResult

BENCH = {
    "runtime": "ONNX Runtime on the CPU",
    "artifact": {"ttft_ms": 1.5},
    "references": {"pytorch_fp32": {"ttft_ms": 3.0}},
    "ratios": {"ttft": 2.0},
}


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, tiny_export: Path) -> None:
    question = SimpleNamespace(image=Path("picture.png"), question="[red] or blue?", answers=("red",))
    monkeypatch.setattr("vlmexport.demo.demo_questions", lambda: [question])
    monkeypatch.setattr(api, "export_onnx", lambda *_a, **_k: ExportResult(open_artifact(tiny_export), None))
    monkeypatch.setattr(api, "bench_artifact", lambda *_a, **_k: SimpleNamespace(to_dict=lambda: BENCH))
    monkeypatch.setattr(api, "answer_prompt", lambda *_a, **_k: SimpleNamespace(text=" red\n"))


@pytest.mark.usefixtures("stubbed")
def test_the_tour_ends_with_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "my demo", tmp_path / "demo.json"
    assert run(["demo", "--out", str(out), "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "Q [red] or blue?" in text
    assert "A red  (right)" in text
    assert f"vlmexport run '{out}' --image picture.png --prompt '[red] or blue?'" in text
    data: dict[str, Any] = json.loads(file.read_text())
    assert set(data) == {"export", "bench", "answers"}
    assert data["answers"][0]["right"] is True


@pytest.mark.usefixtures("stubbed")
def test_no_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "x"), "--no-bench", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["bench"] is None


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert run(["demo", "--out", str(tmp_path)]) == 2
    assert "not an earlier export" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
