"""The steps of action.yml, run here one after the other as a runner would: bash, inputs in the environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from vlmexport.demo import questions_file

ROOT = Path(__file__).parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
FAST = "--quant rtn --group-size 32"


def inputs(**given: str) -> dict[str, str]:
    """All inputs, those of `given` and the others' defaults."""
    unknown = given.keys() - ACTION["inputs"].keys()
    assert not unknown
    return {name: given.get(name, str(spec.get("default", ""))) for name, spec in ACTION["inputs"].items()}


def run_step(name: str, values: dict[str, str], folder: Path, bin_dir: Path | None = None) -> tuple[int, str]:
    """One ``run`` step in `folder`: its exit code and what it printed."""
    step = STEPS[name]
    expressions = re.compile(r"\$\{\{ inputs\.([\w-]+) \}\}")
    given = {key: expressions.sub(lambda found: values[found.group(1)], str(text)) for key, text in step["env"].items()}
    own = bin_dir or Path(sys.executable).parent
    environment = {
        **os.environ,
        **given,
        "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_ACTION_PATH": str(ROOT),
        "GITHUB_OUTPUT": str(folder / "outputs.txt"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def outputs(folder: Path) -> dict[str, str]:
    lines = (folder / "outputs.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def few_questions(folder: Path) -> Path:
    """Six of the bundled questions, with the places of their pictures."""
    source = questions_file()
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:6]]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps({**q, "image": str(source.parent / q["image"])}) for q in lines))
    return file


def test_inputs_are_never_text_of_a_script() -> None:
    """What a user typed could end the command and begin another."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert step.get("shell", "bash") == "bash"


def test_every_input_is_used_and_explained() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    for name, spec in ACTION["inputs"].items():
        assert re.search(rf"inputs\.{name}\b", text)
        assert spec["description"]


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    code, printed = run_step("Export", inputs(model="demo", command="rm -rf"), tmp_path)
    assert (code, "command is 'rm -rf'; choose onnx, gguf or trt" in printed) == (2, True)


def test_code_of_the_model_runs_in_both_steps_or_in_none(tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "vlmexport").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (fake / "vlmexport").chmod(0o755)
    for given, wanted in (("true", True), ("false", False), ("$(id)", False)):
        for step in ("Export", "Verify"):
            values = inputs(model="a", **{"trust-remote-code": given})
            code, printed = run_step(step, values, tmp_path, fake)
            assert (code, "--trust-remote-code|" in printed) == (0, wanted)


def test_options_of_several_lines_all_count(tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "vlmexport").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (fake / "vlmexport").chmod(0o755)
    values = inputs(model="a b", options="--quant awq\n--bits 4  $(rm -rf x)\n")
    code, printed = run_step("Export", values, tmp_path, fake)
    assert code == 0
    wanted = "onnx|--model|a b|--out|vlmexport-out|--no-verify|--quant|awq|--bits|4|$(rm|-rf|x)|"
    assert wanted in printed


@pytest.mark.slow
def test_export_verify_and_a_regression(tmp_path: Path) -> None:
    questions = few_questions(tmp_path)
    values = inputs(model="demo", options=FAST, samples=str(questions))
    assert run_step("Export", values, tmp_path)[0] == 0
    assert outputs(tmp_path)["export"] == "vlmexport-out"
    code, printed = run_step("Verify", values, tmp_path)
    assert code == 0, printed
    reports = tmp_path / values["reports"]
    assert {file.name for file in reports.iterdir()} == {"junit.xml", "report.html", "report.json"}
    # The same export against its own report, and against one that was better.
    report = json.loads((reports / "report.json").read_text())
    report["quantization"]["perplexity_ratio"] *= 0.8
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(report))
    code, printed = run_step("Verify", {**values, "baseline": str(baseline)}, tmp_path)
    assert (code, "worse than the baseline's" in printed) == (3, True), printed
    failed = ElementTree.parse(reports / "junit.xml").findall(".//testcase[failure]")
    assert [case.get("name") for case in failed] == ["baseline/summary/perplexity_ratio"]
    code, printed = run_step("Verify", {**values, "baseline": str(baseline), "max-regression": "150%"}, tmp_path)
    assert code == 0, printed


@pytest.mark.slow
def test_the_install_step_installs_this_repository(tmp_path: Path) -> None:
    """In an environment of its own that sees the packages of this one, so that nothing large is fetched."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin_dir = tmp_path / "venv" / "bin"
    here = next(path for path in sys.path if path.endswith("site-packages"))
    inner = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (inner / "borrowed.pth").write_text(here + "\n")
    code, printed = run_step("Install vlmexport", inputs(model="demo"), tmp_path, bin_dir)
    assert code == 0, printed
    done = subprocess.run([bin_dir / "vlmexport", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
