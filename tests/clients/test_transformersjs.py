"""Exports of the ``transformersjs`` layout in the client itself: Node, and headless Chromium (WebAssembly)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.clients.workplace import Case, Clients, write_jobs
from vlmexport.api import export_onnx
from vlmexport.demo import frozen_questions, model_dir
from vlmexport.dtypes import WEB_DTYPES, WEB_LAYOUT
from vlmexport.lower.onnx.layouts import transformersjs
from vlmexport.manifest import Artifact
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.generate import generate_ids
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.sampling import Sampling
from vlmexport.split.examples import draw_picture
from vlmexport.variants import variant_names

pytestmark = pytest.mark.slow

TOKENS = 24
FLOATS = ("fp32", "fp16")
TASKS = ("describe", "word", "bars", "colour", "code", "where")
# Largest difference of a logit over the largest logit: rounding of float16, and of activations to 8 bits by kernels
# that are not the same in Python, Node and WebAssembly.
CLOSE = {"fp32": 1e-5, "fp16": 5e-3, "q4": 2e-2, "q4f16": 2e-2, "int8": 2e-2}


@dataclass(frozen=True)
class Expected:
    """Per case: the answer's tokens with its end, and the logits of its first token."""

    tokens: list[list[int]]
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Bench:
    """The exports, the questions, and what each dtype has to answer."""

    root: Path
    artifact: Artifact
    cases: list[Case]
    expected: dict[str, Expected]


def options(*dtypes: str) -> OnnxOptions:
    floats = all(name in FLOATS for name in dtypes)
    scheme = None if floats else make_scheme("rtn")
    return OnnxOptions(layout=WEB_LAYOUT, dtypes=dtypes, scheme=scheme, scheme_named=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("web")
    artifact = export_onnx("demo", root / "demo", options(*WEB_DTYPES), verify=False).artifact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformersjs, "ONE_FILE_BYTES", 200_000)
        export_onnx("demo", root / "demo-external", options("fp16"), verify=False)
    broken = root / "demo-broken"
    shutil.copytree(root / "demo", broken)
    damage_scales(broken / "onnx" / "decoder_model_merged_q4.onnx")
    chosen = [next(q for q in frozen_questions() if q.task == task) for task in TASKS]
    builder = PromptBuilder(model_dir())
    cases = [Case(q.question, (q.image,), builder.build([q.image], q.question)) for q in chosen]
    expected = {name: by_onnx_runtime(artifact, name, cases) for name in WEB_DTYPES}
    expected |= dict.fromkeys(FLOATS, by_pytorch(cases))
    return Bench(root, artifact, cases, expected)


def damage_scales(path: Path) -> None:
    """Triple the scales of one matrix in eight of the graph at `path`."""
    model = onnx.load(path)
    scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale")]
    for tensor in scales[::8]:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(3), tensor.name))
    onnx.save(model, path)


def by_pytorch(cases: list[Case]) -> Expected:
    model: Any = load_vlm("demo").model
    model.float()
    tokens, logits = [], []
    for case in cases:
        arrays = {"input_ids": case.inputs.input_ids, **case.inputs.pixel_inputs}
        inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
            logits.append(model(**inputs).logits[0, -1].numpy())
        tokens.append(out[0, case.inputs.input_ids.shape[1] :].tolist())
    return Expected(tokens, logits)


def by_onnx_runtime(artifact: Artifact, name: str, cases: list[Case]) -> Expected:
    runner = OnnxRunner(artifact, variant=name, threads=1)
    (end,) = runner.eos_token_ids
    tokens, logits = [], []
    for case in cases:
        found = generate_ids(runner, [case.inputs], Sampling(max_new_tokens=TOKENS)).tokens[0]
        tokens.append([*found, end] if len(found) < TOKENS else list(found))
        inputs, mask = merged_inputs(runner, [case.inputs])
        logits.append(inputs.prefill(runner, mask)[0][0, -1])
    return Expected(tokens, logits)


JOBS: tuple[dict[str, Any], ...] = (
    *({"model": "demo", "dtype": name} for name in WEB_DTYPES),
    {"model": "demo", "dtype": None},
    {"model": "demo-external", "dtype": "fp16"},
    {"model": "demo-broken", "dtype": "q4"},
)


@pytest.fixture(scope="module")
def node(bench: Bench, clients: Clients) -> list[dict[str, Any]]:
    return clients.node(write_jobs(bench.root, bench.root / "job-node", JOBS, bench.cases, tokens=TOKENS))


@pytest.fixture(scope="module")
def browser(bench: Bench, clients: Clients) -> dict[str, Any]:
    return clients.browser(write_jobs(bench.root, bench.root / "job-browser", JOBS, bench.cases, tokens=TOKENS))


def judge(bench: Bench, found: dict[str, Any], name: str) -> None:
    """The client's answers on given pixels are those that were expected; on its own it reads the same prompt."""
    assert "error" not in found, found["error"]
    expected = bench.expected[name]
    for case, result, tokens, logits in zip(
        bench.cases, found["results"], expected.tokens, expected.logits, strict=True
    ):
        assert result["given"] == tokens, case.text
        assert np.abs(np.array(result["logits"]) - logits).max() <= CLOSE[name] * np.abs(logits).max(), case.text
        assert result["own"]["input_ids"] == case.inputs.input_ids[0].tolist(), case.text
        assert result["own"]["tokens"]


def test_the_questions_tell_answers_apart(bench: Bench) -> None:
    assert len(bench.cases) >= 5
    for expected in bench.expected.values():
        assert len({tuple(tokens) for tokens in expected.tokens}) == len(bench.cases)


@pytest.mark.parametrize("name", list(WEB_DTYPES))
def test_node_gives_the_same_tokens(bench: Bench, node: list[dict[str, Any]], name: str) -> None:
    judge(bench, node[list(WEB_DTYPES).index(name)], name)


@pytest.mark.parametrize("name", list(WEB_DTYPES))
def test_a_browser_gives_the_same_tokens(bench: Bench, browser: dict[str, Any], name: str) -> None:
    judge(bench, browser["results"][list(WEB_DTYPES).index(name)], name)


def test_no_request_leaves_the_machine(browser: dict[str, Any]) -> None:
    assert browser["foreign"] == []


def test_without_a_dtype_the_exports_own_is_taken(bench: Bench, node: list[dict[str, Any]]) -> None:
    primary = variant_names(bench.artifact.manifest)[0]
    judge(bench, node[JOBS.index({"model": "demo", "dtype": None})], primary)


def test_external_data_is_found(bench: Bench, node: list[dict[str, Any]], browser: dict[str, Any]) -> None:
    flags = json.loads((bench.root / "demo-external" / "config.json").read_text())["transformers.js_config"]
    named = flags["use_external_data_format"]
    assert sorted(named) == [f"{part}_fp16.onnx" for part in ("decoder_model_merged", "embed_tokens", "vision_encoder")]
    assert all((bench.root / "demo-external" / "onnx" / f"{file}_data").is_file() for file in named)
    for found in (node, browser["results"]):
        judge(bench, found[JOBS.index({"model": "demo-external", "dtype": "fp16"})], "fp16")


def test_damaged_scales_change_the_answers(bench: Bench, node: list[dict[str, Any]], browser: dict[str, Any]) -> None:
    for found in (node, browser["results"]):
        with pytest.raises(AssertionError):
            judge(bench, found[JOBS.index({"model": "demo-broken", "dtype": "q4"})], "q4")
        answers = [result["given"] for result in found[-1]["results"]]
        assert answers != bench.expected["q4"].tokens


def test_llava_in_node(tiny_llava: Path, clients: Clients, tmp_path: Path) -> None:
    artifact = export_onnx(str(tiny_llava), tmp_path / "llava", options("fp32"), verify=False).artifact
    builder, runner = PromptBuilder(tiny_llava), OnnxRunner(artifact, threads=1)
    text, cases = "what is in the picture?", []
    for seed, size in enumerate(((32, 32), (64, 40), (40, 64))):
        file = tmp_path / f"{seed}.png"
        draw_picture(*size, seed=seed).save(file)
        cases.append(Case(text, (file,), builder.build([file], text)))
    job = {"model": "llava", "dtype": "fp32", "images_first": True}
    (found,) = clients.node(write_jobs(tmp_path, tmp_path / "job", [job], cases, tokens=8))
    assert "error" not in found, found["error"]
    for case, result in zip(cases, found["results"], strict=True):
        tokens = generate_ids(runner, [case.inputs], Sampling(max_new_tokens=8)).tokens[0]
        assert result["given"][: len(tokens)] == list(tokens)
        assert result["own"]["input_ids"] == case.inputs.input_ids[0].tolist()
    assert len({tuple(result["given"]) for result in found["results"]}) > 1
