"""The bench on a gguf export: the same keys as for ONNX, PyTorch beside it, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.bench.test_run import KEYS
from tests.runtime.llamacpp.conftest import Files, make_export
from tools.train_fixture.gguf_files import write_mmproj, write_text
from vlmexport.bench.gguf import Question, load_gguf, measure_answer, save_question, settle_threads
from vlmexport.bench.run import bench_artifact
from vlmexport.cli.main import run
from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError, VlmExportError
from vlmexport.manifest import Artifact, write_manifest
from vlmexport.runtime.llamacpp.export import open_runner
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner


@pytest.fixture(scope="module")
def gguf_export(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("files")
    files = Files(write_text(model_dir(), folder / "text.gguf"), write_mmproj(model_dir(), folder / "mmproj.gguf"))
    return make_export(files, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def runner(gguf_export: Artifact) -> Iterator[LlamaCppRunner]:
    with open_runner(gguf_export, threads=1) as made:
        yield made


@pytest.mark.slow
def test_report_has_the_keys_of_onnx(gguf_export: Artifact) -> None:
    report = bench_artifact(gguf_export.path, tokens=3, rounds=1, threads=1)
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data["artifact"]) == KEYS
    assert set(data["references"]) == {"pytorch_fp32", "pytorch_bf16"}
    assert all(value > 0 for value in data["ratios"].values())
    assert data["settings"]["prompt_tokens"] > 20


def test_without_references(gguf_export: Artifact, tmp_path: Path) -> None:
    report = bench_artifact(_made_from(gguf_export, tmp_path, str(tmp_path / "gone")), tokens=3, rounds=1, threads=1)
    assert set(report.artifact) == KEYS
    assert report.references == {}
    assert "not measured" in report.settings["references"]
    with pytest.raises(BadInputError, match="gone"):
        bench_artifact(gguf_export.path, model=str(tmp_path / "gone"), tokens=2, rounds=1)


def test_a_model_whose_processor_does_not_load_here_is_measured_alone(gguf_export: Artifact, tmp_path: Path) -> None:
    folder = _made_from(gguf_export, tmp_path, "demo")
    broken = {"processor_class": "Idefics3Processor", "image_processor_type": "NoSuchImageProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(broken))
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    write_manifest(folder, gguf_export.manifest)
    report = bench_artifact(folder, tokens=2, rounds=1, threads=1)
    assert report.references == {}
    assert "the processor does not load" in report.settings["references"]


def asking(runner: LlamaCppRunner) -> Question:
    return Question(f"User:{runner.marker}What?", (Image.new("RGB", (64, 64), (200, 30, 40)),))


def test_every_round_encodes_the_picture_and_decodes_all_tokens(runner: LlamaCppRunner) -> None:
    rounds = [measure_answer(runner, asking(runner), 5) for _ in range(2)]
    assert all(len(r.decode_ms) == 5 and r.image_ms > 0.05 and r.prefill_ms > 0 for r in rounds)
    assert rounds[0].prompt_tokens == len(runner.prompt(asking(runner).text, asking(runner).pictures).ids)


def test_the_context_holds_the_question_and_its_answer(gguf_export: Artifact, tmp_path: Path) -> None:
    save_question(gguf_export.path, "word " * 300, [Image.new("RGB", (64, 64))], tmp_path / "question")
    measured = load_gguf(gguf_export.path, tmp_path / "question", 3, 1)()()
    assert measured.prompt_tokens > 256
    assert len(measured.decode_ms) == 3


class Slow:
    """A stand-in for a runner whose answers take `ms` each."""

    def __init__(self, ms: float) -> None:
        self.ms = ms
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("together", "single", "kept"), [(9.0, 4.0, 1), (4.0, 9.0, 2)])
def test_the_faster_number_of_threads_is_kept(
    monkeypatch: pytest.MonkeyPatch, together: float, single: float, kept: int
) -> None:
    pace = {2: together, 1: single}
    made: list[tuple[int, Slow]] = [(2, Slow(together))]
    monkeypatch.setattr("vlmexport.bench.gguf._pace", lambda runner, question: runner.ms)

    def opened(threads: int) -> Any:
        assert all(runner.closed for _, runner in made), "one runner at a time"
        made.append((threads, Slow(pace[threads])))
        return made[-1][1]

    best: Any = settle_threads(made[0][1], opened, Question("", ()), 2)  # type: ignore[arg-type]
    assert best is made[-1][1]
    assert made[-1][0] == kept
    assert not best.closed


def test_a_damaged_half_is_named_by_its_worker(gguf_export: Artifact, tmp_path: Path) -> None:
    folder = _made_from(gguf_export, tmp_path, "gone")
    (folder / "mmproj.gguf").write_bytes((folder / "mmproj.gguf").read_bytes()[:5000])
    write_manifest(folder, gguf_export.manifest)
    with pytest.raises(VlmExportError, match=r"llama\.cpp does not load .*mmproj\.gguf") as caught:
        bench_artifact(folder, tokens=2, rounds=1)
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_the_command(
    gguf_export: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmexport.bench.run.available_cores", lambda: 1)
    assert run(["bench", str(_made_from(gguf_export, tmp_path, "gone")), "--record", "--json", "-"]) == 0
    assert set(json.loads(capsys.readouterr().out)["artifact"]) == KEYS
    assert json.loads((tmp_path / "copy" / "manifest.json").read_text())["results"]["bench"]["artifact"]


def _made_from(export: Artifact, tmp_path: Path, model: str) -> Path:
    """A copy of the export that says it was made from `model`."""
    import dataclasses
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(export.path, folder)
    write_manifest(folder, dataclasses.replace(export.manifest, source={"model": model}))
    return folder
