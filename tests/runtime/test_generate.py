"""Answers from exported graphs alone, on the hand-built export."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.runtime.generate import Timings, answer, generate_ids, generate_steps
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve.engine import open_engine
from vlmexport.serve.limits import Limits


def test_answer_streams_its_text(mock_artifact: Artifact, pictures: list[Path]) -> None:
    seen: list[str] = []
    result = answer(mock_artifact, pictures, "what is it?", Sampling(max_new_tokens=12), seen.append, threads=1)
    assert "".join(seen) == result.text
    data = json.loads(json.dumps(result.to_dict()))
    assert set(data) == {"text", "token_ids", "prompt_tokens", "timings"}
    assert 0 < len(data["token_ids"]) <= 12
    assert data["timings"]["ttft_ms"] == data["timings"]["image_ms"] + data["timings"]["prefill_ms"]


def static(artifact: Artifact, capacity: int) -> Artifact:
    """The export with a manifest that promises room for `capacity` tokens; its own graphs have more."""
    model = {**artifact.manifest.model, "attention": "static", "tensorrt": {"limits": {"max_seq": capacity}}}
    return Artifact(artifact.path, replace(artifact.manifest, model=model))


@pytest.mark.parametrize(("room", "tokens"), [(20, 12), (5, 5), (1, 1), (0, 1)])
def test_an_answer_ends_where_a_static_cache_does(
    mock_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, room: int, tokens: int
) -> None:
    prompt_tokens = PromptBuilder(mock_artifact.path).build([], "what?").input_ids.shape[1]
    runner = OnnxRunner(mock_artifact, threads=1)
    runner.eos_token_ids = ()
    monkeypatch.setattr("vlmexport.runtime.ort.OnnxRunner", lambda *args, **options: runner)
    found = answer(static(mock_artifact, prompt_tokens + room), [], "what?", Sampling(max_new_tokens=12), threads=1)
    assert (len(found.token_ids), found.prompt_tokens) == (tokens, prompt_tokens)


def test_a_batch_answers_like_single_prompts(mock_artifact: Artifact, pictures: list[Path]) -> None:
    builder, runner = PromptBuilder(mock_artifact.path), OnnxRunner(mock_artifact, threads=1)
    prompts = [builder.build(pictures, "what?"), builder.build([], "how many shapes are there?")]
    sampling = Sampling(max_new_tokens=10)
    batch = generate_ids(runner, prompts, sampling)
    assert [generate_ids(runner, [p], sampling).tokens[0] for p in prompts] == list(batch.tokens)


def test_any_of_several_end_tokens_ends(mock_artifact: Artifact) -> None:
    builder, runner = PromptBuilder(mock_artifact.path), OnnxRunner(mock_artifact, threads=1)
    prompt = builder.build([], "where is the green star?")
    free = generate_ids(runner, [prompt], Sampling(max_new_tokens=8)).tokens[0]
    runner.eos_token_ids = (9999, free[2])
    assert generate_ids(runner, [prompt], Sampling(max_new_tokens=8)).tokens[0] == free[: free.index(free[2])]


def test_end_tokens_come_from_the_generation_config(mock_artifact: Artifact) -> None:
    config = json.loads((mock_artifact.path / "generation_config.json").read_text())
    assert OnnxRunner(mock_artifact).eos_token_ids == (config["eos_token_id"],)


def test_a_broken_generation_config_is_named(mock_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"generation_config\.json is not valid JSON"):
        _ = OnnxRunner(Artifact(tmp_path, mock_artifact.manifest)).eos_token_ids


def test_a_seed_repeats_an_answer(mock_artifact: Artifact) -> None:
    runner = OnnxRunner(mock_artifact, threads=1)
    prompt = PromptBuilder(mock_artifact.path).build([], "read the word.")
    draw = [generate_ids(runner, [prompt], Sampling(2.0, seed=s, max_new_tokens=12)).tokens for s in (3, 3, 4)]
    assert draw[0] == draw[1] != draw[2]


def test_no_prompt_is_refused(mock_artifact: Artifact) -> None:
    with pytest.raises(BadInputError, match="no prompt"):
        next(generate_steps(OnnxRunner(mock_artifact), [], Sampling(), Timings()))


def test_a_wrong_image_token_count_is_named(mock_artifact: Artifact, pictures: list[Path]) -> None:
    runner = OnnxRunner(mock_artifact, threads=1)
    inputs = PromptBuilder(mock_artifact.path).build(pictures, "what?")
    inputs.pixel_inputs["pixel_values"] = inputs.pixel_inputs["pixel_values"][:, :1]
    with pytest.raises(BadInputError, match="image tokens"):
        generate_ids(runner, [inputs])


def test_the_graphs_run_without_pytorch(mock_artifact: Artifact, tmp_path: Path) -> None:
    """The runner itself imports no torch: a service that makes its own inputs needs none."""
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from vlmexport.manifest import open_artifact; from vlmexport.runtime.ort import OnnxRunner\n"
        "from vlmexport.runtime.protocol import ModelInputs; from vlmexport.runtime.generate import generate_ids\n"
        f"runner = OnnxRunner(open_artifact(Path({str(mock_artifact.path)!r})), threads=1)\n"
        "generate_ids(runner, [ModelInputs(np.array([[60, 61]]))])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_a_processor_runs_where_it_is_trusted(
    mock_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    asked: list[bool] = []

    def load(_builder: PromptBuilder, _folder: Path, *, trust_remote_code: bool = False) -> None:
        asked.append(trust_remote_code)
        raise BadInputError("enough")

    monkeypatch.setattr(PromptBuilder, "__init__", load)
    for open_it in (
        lambda: answer(mock_artifact, [], "what?", threads=1, trust_remote_code=trusted),
        lambda: open_engine(mock_artifact, Limits(), 1, trust_remote_code=trusted),
    ):
        with pytest.raises(BadInputError, match="enough"):
            open_it()
    assert asked == [trusted, trusted]
