"""The genai layout in onnxruntime-genai: the same tokens as our runner, from tensors and from its own processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families.tiny_qwen import SPECIAL, make_tiny_qwen
from tests.families.tiny_text import picture
from vlmexport.api import export_onnx
from vlmexport.errors import ArtifactError
from vlmexport.families.genai import GENAI_FAMILIES
from vlmexport.manifest import Artifact
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.runtime import genai
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.genai import GenaiModel
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.verify.gates import Gate
from vlmexport.verify.genai import check_genai
from vlmexport.verify.parts import Prompt

pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.slow
SIZES = (((112, 84),), ((280, 56),), ((140, 84), (56, 112)), ())
TOKENS = 16


def composed(folder: Any, **_: Any) -> Any:
    """The family's processor without the one for videos, which wants torchvision."""
    import transformers

    image = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.Qwen2_5_VLProcessor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
        return kind(image, tokenizer, None, chat_template=tokenizer.chat_template)


@pytest.fixture(scope="module", autouse=True)
def processors() -> Iterator[None]:
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoProcessor, "from_pretrained", staticmethod(composed))
        yield


@pytest.fixture(scope="module")
def folder(processors: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny Qwen2.5-VL of floats, exported by the whole pipeline."""
    return exported("qwen2_5_vl", tmp_path_factory.mktemp("genai"))


def exported(family: str, base: Path, bits: int = 0) -> Artifact:
    options = OnnxOptions(layout="genai", scheme=make_scheme("rtn", bits) if bits else None)
    source = make_tiny_qwen(family, base / "model")
    return export_onnx(str(source), base / "export", options, verify=False).artifact


def prompts(folder: Artifact) -> list[ModelInputs]:
    builder = PromptBuilder(folder.path)
    return [builder.build([picture(*size, seed=i) for i, size in enumerate(p)], "What is it?") for p in SIZES]


def greedy(runner: OnnxRunner, inputs: ModelInputs) -> tuple[Any, list[int]]:
    """Logits behind the prompt and the tokens of our runner."""
    logits, cache = merged_inputs(runner, [inputs])[0].prefill(runner, reserve=TOKENS)
    first, tokens = logits[0, -1], []
    while len(tokens) < TOKENS:
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in runner.eos_token_ids:
            break
        logits = runner.decode(runner.embed(np.array([[tokens[-1]]])), cache)
    return first, tokens


def text_of(folder: Artifact, question: str, pictures: int) -> str:
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return str(composed(folder.path).apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def test_every_claimed_family_is_run() -> None:
    assert set(GENAI_FAMILIES) == {"qwen2_vl", "qwen2_5_vl"}


def test_the_same_tokens_from_the_same_tensors(folder: Artifact) -> None:
    assert same_answers(folder, prompts(folder)) == len(SIZES)


@pytest.mark.family
def test_qwen2_vl_with_codes(tmp_path: Path) -> None:
    # One picture each: several are encoded one by one there, and codes round what differs in the last bit.
    folder = exported("qwen2_vl", tmp_path, 4)
    assert same_answers(folder, [p for p, s in zip(prompts(folder), SIZES, strict=True) if len(s) < 2]) == 3


def same_answers(folder: Artifact, given: list[ModelInputs]) -> int:
    """Compare logits and tokens; how many different answers there were."""
    runner, model = OnnxRunner(folder, threads=1), GenaiModel(folder.path)
    answers = []
    for inputs in given:
        wanted, tokens = greedy(runner, inputs)
        logits, made = model.greedy(model.tensors(inputs), TOKENS)
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
        assert made == tokens
        answers.append(made)
    return len({tuple(answer) for answer in answers})


def test_the_same_tokens_from_its_own_processor(folder: Artifact, tmp_path: Path) -> None:
    runner, model, builder = OnnxRunner(folder, threads=1), GenaiModel(folder.path), PromptBuilder(folder.path)
    for index, size in enumerate([(112, 84), (100, 75), (333, 217)]):
        drawn = picture(*size, seed=index)
        drawn.save(tmp_path / "picture.png")
        inputs = builder.build([drawn], "What is it?")
        made = model.prepare(text_of(folder, "What is it?", 1), tmp_path / "picture.png")
        np.testing.assert_array_equal(made["input_ids"].as_numpy(), inputs.input_ids)
        np.testing.assert_array_equal(made["image_grid_thw"].as_numpy(), inputs.pixel_inputs["image_grid_thw"])
        np.testing.assert_allclose(made["pixel_values"].as_numpy(), inputs.pixel_inputs["pixel_values"], atol=1e-6)
        assert model.greedy(made, TOKENS)[1] == greedy(runner, inputs)[1]
    text = model.prepare(text_of(folder, "What is it?", 0))
    assert model.greedy(text, TOKENS)[1] == greedy(runner, builder.build([], "What is it?"))[1]


def test_pictures_made_smaller_differ_by_a_few_levels(folder: Artifact, tmp_path: Path) -> None:
    drawn = picture(641, 480)
    drawn.save(tmp_path / "picture.png")
    inputs = PromptBuilder(folder.path).build([drawn], "What?")
    made = GenaiModel(folder.path).prepare(text_of(folder, "What?", 1), tmp_path / "picture.png")
    levels = np.abs(made["pixel_values"].as_numpy() - inputs.pixel_inputs["pixel_values"]) * 0.28 * 255
    assert levels.max() < 3
    assert levels.mean() < 0.1


def checked(artifact: Artifact, inputs: ModelInputs) -> dict[str, str]:
    gate = Gate()
    check_genai(gate, artifact, [Prompt("probe", inputs, None)], OnnxRunner(artifact, threads=1), 1e-2)
    return {check.name: check.status for check in gate.checks}


def damaged(folder: Artifact, copy: Path, name: str, change: Any) -> Artifact:
    shutil.copytree(folder.path, copy)
    change(copy / name)
    return Artifact(copy, folder.manifest)


def other_grid(file: Path) -> None:
    body = json.loads(file.read_text())
    body["model"]["vision_start_token_id"] = SPECIAL.index("<|vision_end|>")
    file.write_text(json.dumps(body))


def other_place(file: Path) -> None:
    import onnx

    model = onnx.load(file, load_external_data=False)
    token = next(tensor for tensor in model.graph.initializer if tensor.name == "merge.image_token")
    token.CopyFrom(onnx.numpy_helper.from_array(np.array(SPECIAL.index("<|video_pad|>")), token.name))
    file.write_bytes(model.SerializeToString())


def test_the_gate_runs_it_and_names_what_was_damaged(
    folder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prompts(folder)[0]
    merge, answer, steps = "embed_tokens/merge[probe]", "model/genai[probe]", "model/genai[probe]:greedy"
    assert checked(folder, inputs) == {merge: "passed", answer: "passed", steps: "passed"}
    positions = checked(damaged(folder, tmp_path / "a", "genai_config.json", other_grid), inputs)
    assert (positions[merge], positions[answer]) == ("passed", "failed")
    merged = checked(damaged(folder, tmp_path / "b", "embedding.onnx", other_place), inputs)
    assert merged[merge] == "failed"
    lost = damaged(folder, tmp_path / "c", "vision.onnx", Path.unlink)
    with pytest.raises(ArtifactError, match="onnxruntime-genai does not load it"):
        GenaiModel(lost.path)
    monkeypatch.setattr(genai, "PACKAGE", "no_such_package_of_ours")
    assert checked(folder, inputs) == {merge: "passed", answer: "not_run"}


def test_files(folder: Artifact) -> None:
    names = {path.name for path in folder.path.iterdir()}
    assert {"genai_config.json", "genai_processor.json", "vision.onnx", "embedding.onnx", "decoder.onnx"} <= names
    model = json.loads((folder.path / "genai_config.json").read_text())["model"]
    assert (model["type"], model["image_token_id"]) == ("qwen2_5_vl", SPECIAL.index("<|image_pad|>"))
    assert folder.manifest.model["made_inputs"] == ["num_logits_to_keep"]
    assert "num_logits_to_keep" not in {spec.name for spec in folder.manifest.parts["decoder"].inputs}
    assert {"input_ids", "image_features"} == {spec.name for spec in folder.manifest.parts["embed_tokens"].inputs}


def test_the_cards_lines_answer(folder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user pastes them, in the export's folder; with a shorter limit, since the model never ends.

    Tokens are compared, not their text: those of a random model are no UTF-8.
    """
    card = (folder.path / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n", 1)[1].split("```", 1)[0]
    drawn = picture(112, 84)
    drawn.save(tmp_path / "picture.png")
    inputs = PromptBuilder(folder.path).build([drawn], "What is in this picture?")
    limit = f"max_length={inputs.input_ids.shape[1] + TOKENS}"
    code = code.replace("max_length=2048", limit).replace('"."', f'"{folder.path}"')
    code = code.replace("stream.decode(generator.get_next_tokens()[0])", "int(generator.get_next_tokens()[0])")
    made: list[int] = []
    monkeypatch.chdir(tmp_path)
    exec(code, {"print": lambda token, **_: made.append(token)})
    assert made == greedy(OnnxRunner(folder, threads=1), inputs)[1]
