"""``run`` on a gguf export: the same output as for ONNX exports, by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.llamacpp.conftest import Files, Reference, asked, make_export, some_questions
from vlmexport.cli.main import run
from vlmexport.errors import ArtifactError
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.runtime.generate import answer
from vlmexport.runtime.llamacpp.export import open_runner
from vlmexport.runtime.sampling import Sampling

Capture = pytest.CaptureFixture[str]


def test_the_answer_is_that_of_transformers(export: Artifact, reference: Reference) -> None:
    question = some_questions(1)[0]
    ids = reference.greedy(reference.inputs(asked(question), question.question))
    shown: list[str] = []
    given = answer(export, [Path(question.image)], question.question, on_text=shown.append, threads=1)
    assert given.text == "".join(shown) == reference.builder.tokenizer.decode(ids, skip_special_tokens=True)
    assert given.token_ids == tuple(ids[:-1])
    assert given.prompt_tokens == reference.inputs(asked(question), question.question)["input_ids"].shape[1]
    assert given.timings["load_ms"] > 0
    assert given.timings["ttft_ms"] == given.timings["image_ms"] + given.timings["prefill_ms"]


def test_run_writes_what_it_writes_for_onnx(export: Artifact, capsys: Capture) -> None:
    question = some_questions(1)[0]
    asking = ["run", str(export.path), "--image", str(question.image), "--prompt", question.question]
    assert run([*asking, "--max-new-tokens", "5", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert set(data) == {"text", "token_ids", "prompt_tokens", "timings"}
    assert len(data["token_ids"]) <= 5
    assert err == data["text"] + "\n"


def test_a_stop_text_and_a_seed_work(export: Artifact) -> None:
    question = some_questions(1)[0]
    whole = answer(export, [Path(question.image)], question.question, threads=1).text
    stopped = answer(export, [Path(question.image)], question.question, Sampling(stop=(whole[3:6],)), threads=1).text
    assert stopped == whole[: whole.index(whole[3:6])]
    drawn = Sampling(temperature=3, seed=5, max_new_tokens=6)
    first, again = (answer(export, [], "What?", drawn, threads=1).token_ids for _ in range(2))
    assert first == again


def test_bad_input_is_one_line(export: Artifact, tmp_path: Path, capsys: Capture) -> None:
    assert run(["run", str(export.path), "--image", str(tmp_path / "no.png"), "--prompt", "?"]) == 2
    assert "no such image" in capsys.readouterr().err
    assert run(["run", str(export.path), "--prompt", "what is <__media__>?"]) == 2
    assert "must not contain '<__media__>'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_prompt_longer_than_the_default_context(export: Artifact) -> None:
    given = answer(export, [], "Is 42 + 17 = 59? " * 250, Sampling(max_new_tokens=2), threads=1)
    assert given.prompt_tokens > 4096


def test_a_damaged_half_is_named(gguf: Files, tmp_path: Path) -> None:
    made = make_export(gguf, tmp_path)
    (tmp_path / "mmproj.gguf").write_bytes(gguf.mmproj.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"mmproj\.gguf was changed after the export"):
        open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match=r"llama\.cpp does not load .*mmproj\.gguf"):
        open_runner(made)
