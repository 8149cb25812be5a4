"""Every family that the ``transformersjs`` layout claims, in the client itself (Node): tokens, logits, prompts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.clients.checkpoints import CASES, MODEL_TYPES, WebCase, use_case
from tests.clients.workplace import Case, Clients, write_jobs
from tests.families.tiny_text import picture
from vlmexport.api import export_onnx
from vlmexport.dtypes import WEB_LAYOUT
from vlmexport.families.transformersjs import WEB_FAMILIES
from vlmexport.manifest import Artifact
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.generate import generate_ids
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.sampling import Sampling

pytestmark = pytest.mark.slow

TOKENS = 12
DTYPES = ("fp32", "q4")
# Largest difference of a logit over the largest: of another library's kernels; of the same kernels on codes.
CLOSE = {"fp32": 1e-3, "q4": 2e-2}
# The demo is of this type, and answers in tests/clients/test_transformersjs.py.
OF_THE_DEMO = {"smolvlm"}
# One family stays in the default run: the one whose prompts differ most from the demo's.
DEFAULT = "qwen2_vl"


@dataclass(frozen=True)
class Bench:
    """An export and its prompts; per dtype and prompt the greedy tokens and the logits behind the prompt."""

    root: Path
    artifact: Artifact
    prompts: list[Case]
    tokens: dict[str, list[list[int]]]
    logits: dict[str, list[np.ndarray]]


def make_bench(case: WebCase, root: Path) -> Bench:
    source = case.make(root / "source")
    options = OnnxOptions(layout=WEB_LAYOUT, dtypes=DTYPES, scheme=make_scheme("rtn"), scheme_named=True)
    artifact = export_onnx(str(source), root / "export", options, verify=False).artifact
    builder, prompts, text = PromptBuilder(source), [], "what is in the picture?"
    for index, sizes in enumerate(case.sizes):
        files = tuple(root / f"{index}.{place}.png" for place in range(len(sizes)))
        for place, (file, size) in enumerate(zip(files, sizes, strict=True)):
            picture(*size, seed=10 * index + place).save(file)
        prompts.append(Case(text, files, builder.build(files, text)))
    torch_tokens, torch_logits = by_pytorch(source, case, prompts)
    ort_tokens, ort_logits = by_onnx_runtime(artifact, prompts)
    tokens, logits = {"fp32": torch_tokens, "q4": ort_tokens}, {"fp32": torch_logits, "q4": ort_logits}
    return Bench(root, artifact, prompts, tokens, logits)


def by_pytorch(source: Path, case: WebCase, prompts: list[Case]) -> tuple[list[list[int]], list[np.ndarray]]:
    vlm = load_vlm(str(source))
    model: Any = vlm.model
    model.float()
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.inputs.input_ids)
        inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in prompt.inputs.pixel_inputs.items()}
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if case.kinds:
            of_pictures = (ids == vlm.facts.image_token_id).int()
            inputs[case.kinds] = of_pictures if case.kinds == "mm_token_type_ids" else torch.zeros_like(ids)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
            logits.append(model(**inputs).logits[0, -1].numpy())
        tokens.append(out[0, ids.shape[1] :].tolist())
    return tokens, logits


def by_onnx_runtime(artifact: Artifact, prompts: list[Case]) -> tuple[list[list[int]], list[np.ndarray]]:
    runner = OnnxRunner(artifact, variant="q4", threads=1)
    tokens, logits = [], []
    for prompt in prompts:
        tokens.append(list(generate_ids(runner, [prompt.inputs], Sampling(max_new_tokens=TOKENS)).tokens[0]))
        inputs, mask = merged_inputs(runner, [prompt.inputs])
        logits.append(inputs.prefill(runner, mask)[0][0, -1])
    return tokens, logits


def judge(bench: Bench, found: dict[str, Any], name: str) -> None:
    """The client's answers on Python's pixels are those that were expected; on its own it reads the same prompt."""
    assert "error" not in found, found["error"]
    rows = zip(bench.prompts, found["results"], bench.tokens[name], bench.logits[name], strict=True)
    for prompt, result, tokens, logits in rows:
        about = f"{name}, {len(prompt.images)} pictures"
        assert np.abs(np.array(result["logits"]) - logits).max() <= CLOSE[name] * np.abs(logits).max(), about
        assert result["given"][: len(tokens)] == tokens, about
        if len(prompt.images) == 1:
            assert result["own"]["input_ids"] == prompt.inputs.input_ids[0].tolist(), about
            assert result["own"]["tokens"], about


def damage(path: Path) -> None:
    """Triple the scales of every matrix of the graph at `path`."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".scale"):
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(3), tensor.name))
    onnx.save(model, path)


def test_every_claimed_family_is_run() -> None:
    assert {MODEL_TYPES.get(name, name) for name in CASES} | OF_THE_DEMO == set(WEB_FAMILIES)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == DEFAULT else pytest.mark.family) for name in CASES]
)
def test_node_gives_the_same_tokens(
    family: str, clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[family]
    use_case(monkeypatch, case)
    bench = make_bench(case, tmp_path)
    jobs = [{"model": "export", "dtype": n, "images_first": case.images_first, "plain": case.plain} for n in DTYPES]
    if family == DEFAULT:
        shutil.copytree(bench.artifact.path, tmp_path / "broken")
        damage(tmp_path / "broken" / "onnx" / "decoder_model_merged_q4.onnx")
        jobs.append({**jobs[-1], "model": "broken"})
    found = clients.node(write_jobs(tmp_path, tmp_path / "job", jobs, bench.prompts, tokens=TOKENS))
    for name, results in zip(DTYPES, found, strict=False):
        judge(bench, results, name)
        assert len({tuple(tokens) for tokens in bench.tokens[name]}) > 1
    for results in found[len(DTYPES) :]:
        with pytest.raises(AssertionError):
            judge(bench, results, "q4")
