"""The steps of ``vlmexport demo``: export, gate, bench, three questions, where everything is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport import api
from vlmexport.cli.bench import print_bench
from vlmexport.cli.onnx import print_result, raise_if_failed, result_data
from vlmexport.cli.session import Session
from vlmexport.errors import BadInputError
from vlmexport.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from rich.console import Console

    from vlmexport.pipeline import ExportResult


def take_tour(session: Session, out: Path, *, bench: bool) -> dict[str, Any]:
    """Run the demo into `out` and return its ``--json`` data; raises `GateFailedError` when the gate is red."""
    console = session.console()
    _refuse_foreign_folder(out)
    console.rule("1  Split, quantize and export the bundled model, then prove it")
    result = _export(session, out)
    print_result(result, console)
    if result.report is not None:
        _print_gate(result, console)
        raise_if_failed(result.report)
    data: dict[str, Any] = {"export": result_data(result), "bench": None, "answers": []}
    if bench:
        console.rule("2  Measure it against PyTorch")
        with session.progress() as progress:
            data["bench"] = api.bench_artifact(out, progress=progress).to_dict()
        print_bench(data["bench"], console)
    console.rule("3  Ask it about a picture")
    data["answers"] = _ask(console, out)
    _print_where(console, out, data["answers"])
    return data


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise BadInputError(f"{out} exists and is not an earlier export; choose another folder with --out")


def _export(session: Session, out: Path) -> ExportResult:
    from vlmexport.plan import OnnxOptions

    with session.progress() as progress:
        return api.export_onnx("demo", out, OnnxOptions(), force=True, progress=progress)


def _print_gate(result: ExportResult, console: Console) -> None:
    from vlmexport.verify.report.console import print_report

    if result.report is not None:
        print_report(result.report, console)


def _ask(console: Console, out: Path) -> list[dict[str, Any]]:
    from vlmexport.demo import demo_questions
    from vlmexport.runtime.sampling import Sampling

    answers: list[dict[str, Any]] = []
    for question in demo_questions():
        answer = api.answer_prompt(out, [question.image], question.question, Sampling(max_new_tokens=32), _discard)
        text = answer.text.strip()
        right = text in question.answers
        console.print(f"  {question.image}", style="dim", markup=False, soft_wrap=True)
        console.print(f"  Q {question.question}", markup=False, soft_wrap=True)
        verdict = "right" if right else f"wrong, expected: {' / '.join(question.answers)}"
        console.print(f"  A {text}  ({verdict})", markup=False, soft_wrap=True)
        answers.append({"image": str(question.image), "question": question.question, "answer": text, "right": right})
    return answers


def _discard(text: str) -> None:
    """The tour prints whole answers."""


def _print_where(console: Console, out: Path, answers: list[dict[str, Any]]) -> None:
    console.rule("Done")
    lines = [f"The export is in {out}; its {MANIFEST_NAME} says what it holds and what was proved."]
    if answers:
        image, question = shlex.quote(answers[0]["image"]), shlex.quote(answers[0]["question"])
        lines.append(f"Ask it yourself:  vlmexport run {shlex.quote(str(out))} --image {image} --prompt {question}")
    lines.append("Your own model:   vlmexport onnx --model FOLDER --out DIR")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
