"""Models whose code ships with their checkpoint: what works, what is refused, and that no code runs unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.model.remote.fixture import examples, load, make_remote
from tests.zoo.measure import image_effect, int4_difference, largest
from tests.zoo.proof import FLOATS, Zooed, export
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.model.remote import remote_name
from vlmexport.split.capture import split_model

WHOLE = "OwnForConditionalGeneration"
_TOKEN = "no image token id in its config (image_token_id or image_token_index)"
_DECODER = "no get_decoder() that gives a text model of transformers"
_POST_INIT = "no post_init() in its __init__ (transformers 5 loads no such)"
# What a model of each interface lacks, word for word and in order.
SHAPES = {
    "Phi3VForCausalLM": ["no get_image_features()", _TOKEN],
    "KimiVLForConditionalGeneration": ["no get_image_features()", _TOKEN],
    "DeepseekVLV2ForCausalLM": [
        "no get_image_features()", _DECODER, "no get_input_embeddings()", "no get_output_embeddings()", _TOKEN,
    ],
    "MiniCPMV": [
        _POST_INIT, "no get_image_features()", "no input_ids in its forward()", _DECODER, "no get_output_embeddings()",
        _TOKEN,
    ],
    "MolmoForCausalLM": [_POST_INIT, "no get_image_features()", _DECODER, _TOKEN],
    "HfMoondream": [
        _POST_INIT, "no get_image_features()", "no input_ids in its forward()", _DECODER, "no get_input_embeddings()",
        "no get_output_embeddings()", _TOKEN,
    ],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of checkpoints to a folder of modules: not the user's."""
    from transformers import dynamic_module_utils

    before, paths = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path)
    dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield
    dynamic_module_utils.HF_MODULES_CACHE, sys.path[:] = before, paths
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def one_line(error: pytest.ExceptionInfo[UnsupportedModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.slow
def test_a_model_of_its_own_code_is_exported_and_equal(tmp_path: Path) -> None:
    vlm = load(make_remote(tmp_path / "own_whole", WHOLE))
    made = examples()
    zooed = Zooed(vlm, split_model(vlm, made), made)
    assert zooed.split.replay_difference <= 1e-5
    artifact = export(zooed, FLOATS, tmp_path / "onnx")
    assert largest(zooed, artifact) <= 1e-4
    assert image_effect(vlm, made[-1]) > 0.01
    rounded, whole = int4_difference(zooed, tmp_path / "int4")
    assert rounded <= 1e-4 < whole
    code = artifact.manifest.source["remote_code"]
    assert set(code["files"]) >= {"configuration_own.py", "modeling_own.py"}
    assert (code["model"], code["processor"]) == (True, False)
    assert "its processor does not need them" in (artifact.path / "README.md").read_text()
    with torch.no_grad():
        vlm.model.projector.out.bias.add_(1)  # another model than the exported one
    assert largest(zooed, artifact) > 1e-4


@pytest.mark.parametrize("auto", ["AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModel"])
def test_any_auto_class_names_the_model(tmp_path: Path, auto: str) -> None:
    assert type(load(make_remote(tmp_path / f"own_{auto}", WHOLE, auto=auto)).model).__name__ == WHOLE


def test_the_most_fitting_auto_class_is_taken() -> None:
    named = {"AutoModel": "m.A", "AutoModelForCausalLM": "m.B", "AutoModelForImageTextToText": "m.C"}
    assert remote_name({"auto_map": named}) == "AutoModelForImageTextToText"
    assert remote_name({"auto_map": {"AutoModel": "m.A", "AutoModelForCausalLM": "m.B"}}) == "AutoModelForCausalLM"
    assert remote_name({"auto_map": {"AutoConfig": "m.A"}}) is None
    assert remote_name({}) is None


@pytest.mark.parametrize("name", SHAPES)
def test_all_that_a_class_lacks_is_in_one_line(tmp_path: Path, name: str) -> None:
    folder = make_remote(tmp_path / f"own_{name}", name, "modeling_shapes", image_token_id=None)
    with pytest.raises(UnsupportedModelError) as error:
        load(folder)
    missing = SHAPES[name]
    listed = f"{', '.join(missing[:-1])} and {missing[-1]}"
    text = one_line(error)
    assert f"the model class {name} of remote code has {listed}; vlmexport needs get_image_features()" in text


def test_a_token_that_is_no_row_is_refused(tmp_path: Path) -> None:
    folder = make_remote(tmp_path / "own_token", WHOLE, image_token_id=-1)
    with pytest.raises(UnsupportedModelError) as error:
        load(folder)
    assert "has an image token id (image_token_id -1) that is no row of its embeddings (320)" in one_line(error)


@pytest.mark.parametrize(("own", "first"), [([0, 1], 0), ([1], 1)])
def test_attention_in_code_of_its_own_is_refused(tmp_path: Path, own: list[int], first: int) -> None:
    name = "OwnAttentionForCausalLM"
    vlm = load(make_remote(tmp_path / f"own_attention_{first}", name, "modeling_shapes", own_layers=own))
    with pytest.raises(UnsupportedModelError) as error:
        split_model(vlm, examples())
    text = one_line(error)
    assert f"layer {first} of the decoder LlamaModel computes attention in its own code ({len(own)} of 2" in text


def test_code_for_another_transformers_is_one_line(tmp_path: Path) -> None:
    vlm = load(make_remote(tmp_path / "own_broken", "Broken", "modeling_shapes"))
    with pytest.raises(UnsupportedModelError) as error:
        split_model(vlm, examples())
    assert "its remote code fails with transformers" in one_line(error)
    assert "get_usable_length" in one_line(error)


def test_code_that_is_missing_is_one_line(tmp_path: Path) -> None:
    folder = make_remote(tmp_path / "own_missing", WHOLE)
    (folder / "modeling_own.py").unlink()
    with pytest.raises(UnsupportedModelError) as error:
        load(folder)
    assert "modeling_own.py" in one_line(error)


def _as_if_unasked(folder: Path) -> Path:
    """The processor and the tokenizer name code too."""
    named = {"auto_map": {"AutoProcessor": "modeling_own.Tower", "AutoTokenizer": ["modeling_own.Tower", None]}}
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(named))
    code = folder / "modeling_own.py"
    code.write_text(code.read_text() + "\n# Changed, so that it is imported anew.\n")
    return folder


def test_no_code_is_imported_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _as_if_unasked(make_remote(tmp_path / "own_unasked", WHOLE))
    witness = tmp_path / "witness"
    monkeypatch.setenv("VLMEXPORT_TEST_WITNESS", str(witness))
    with pytest.raises(UnsupportedModelError) as error:
        load_vlm(str(folder))
    assert "--trust-remote-code" in one_line(error)
    assert not witness.exists()
    load(folder)
    assert witness.exists()


@pytest.mark.slow
def test_no_command_imports_code_without_the_flag(tmp_path: Path) -> None:
    folder = _as_if_unasked(make_remote(tmp_path / "own_commands", WHOLE))
    witness, modules = tmp_path / "witness", tmp_path / "modules"
    environment = {**os.environ, "VLMEXPORT_TEST_WITNESS": str(witness), "HF_MODULES_CACHE": str(modules)}
    out = ["--out", str(tmp_path / "out")]
    script = (
        "import sys; from vlmexport.cli.main import main\n"
        "for words in __import__('json').loads(sys.argv[1]):\n"
        "    sys.argv = ['vlmexport', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: print('exit', end.code)\n"
    )
    given = ["--model", str(folder)]
    commands = [
        ["inspect", str(folder)], ["onnx", *given, *out], ["gguf", *given, *out],
        ["trt", *given, *out, "--gpu", "a100"], ["quantize", *given, *out],
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=300,
    )  # fmt: skip
    assert run.stdout.count("exit 2") == len(commands), run.stdout + run.stderr
    assert run.stderr.count("--trust-remote-code") >= len(commands), run.stderr
    assert not witness.exists()
    assert not list(modules.rglob("modeling_own.py"))


def test_a_processor_and_a_tokenizer_run_no_code_without_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A native model's folder whose processor names code: nothing asks the user, nothing is imported."""
    from vlmexport.errors import VlmExportError
    from vlmexport.runtime.preprocessor import ProcessorTensors
    from vlmexport.runtime.prompt import PromptBuilder

    folder = _as_if_unasked(make_remote(tmp_path / "own_processor", WHOLE))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava", "auto_map": {}}))
    witness = tmp_path / "witness"
    monkeypatch.setenv("VLMEXPORT_TEST_WITNESS", str(witness))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    for load_it in (PromptBuilder, ProcessorTensors.load):
        with suppress(VlmExportError):  # transformers may take its own classes instead
            load_it(folder)
    assert not witness.exists()
    with suppress(Exception):  # what is named is no processor
        PromptBuilder(folder, trust_remote_code=True)
    assert witness.exists()
