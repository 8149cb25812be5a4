"""``vlmexport onnx --with-preprocessor``: the part, answers from its pixels, and refusals before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlmexport.cli.main import run
from vlmexport.demo import demo_questions
from vlmexport.manifest import open_artifact
from vlmexport.runtime.generate import generate_ids
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.preprocessor import Preprocessor
from vlmexport.runtime.prompt import PromptBuilder, load_image
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.sampling import Sampling

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with its preprocessing graph, not judged."""
    out = tmp_path_factory.mktemp("export") / "demo"
    options = ["--quant", "rtn", "--with-preprocessor", "--no-verify", "-q"]
    assert run(["onnx", "--model", "demo", "--out", str(out), *options]) == 0
    return out


@pytest.mark.slow
def test_the_manifest_lists_the_part(export: Path) -> None:
    manifest = open_artifact(export).manifest
    part = manifest.parts["preprocessor"]
    assert (part.file, manifest.plan["options"]["preprocessor"]) == ("preprocessor.onnx", True)
    assert [(s.name, s.dtype, s.dims) for s in part.inputs] == [("image", "uint8", ("image_height", "image_width", 3))]
    assert {s.name: (s.dtype, s.dims) for s in part.outputs} == {
        "pixel_values": ("float32", (1, "tiles", 3, 32, 32)),
        "pixel_attention_mask": ("int64", (1, "tiles", 32, 32)),
        "rows": ("int64", (1, 1)),
        "cols": ("int64", (1, 1)),
    }
    assert "preprocessor.onnx" in manifest.files


@pytest.mark.slow
def test_answers_from_the_graphs_pixels_are_those_from_the_processors(export: Path) -> None:
    artifact = open_artifact(export)
    builder, graph = PromptBuilder(export), Preprocessor(export / "preprocessor.onnx", threads=1)
    runner = OnnxRunner(artifact, threads=1)
    for question in demo_questions():
        picture = load_image(question.image)
        own = builder.build([picture], question.question)
        made = graph(np.asarray(picture))
        pixels = {name: made[name] for name in own.pixel_inputs}
        assert all(np.array_equal(own.pixel_inputs[name], pixels[name]) for name in pixels)
        answers = [
            generate_ids(runner, [inputs], Sampling(max_new_tokens=16)).tokens
            for inputs in (own, ModelInputs(own.input_ids, pixels))
        ]
        assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_graph_that_was_swapped_fails_the_gate(export: Path, tmp_path: Path, capsys: Capture) -> None:
    """Another mean in the file, and a manifest that knows its digest: only the processor tells."""
    import onnx
    from onnx import numpy_helper

    from vlmexport.manifest import write_manifest

    changed = tmp_path / "changed"
    shutil.copytree(export, changed)
    model = onnx.load(changed / "preprocessor.onnx")
    for constant in model.graph.initializer:
        if constant.data_type == onnx.TensorProto.FLOAT and list(constant.dims) == [3]:
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * 0.9, constant.name))
    onnx.save(model, changed / "preprocessor.onnx")
    write_manifest(changed, open_artifact(export).manifest)
    assert run(["verify", str(changed), "-q"]) == 3
    assert "the gate failed: preprocessor: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["onnx", "plan"])
def test_a_processor_without_a_graph_is_refused_before_any_work(
    command: str, tiny_idefics3: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_idefics3, folder)
    (folder / "model.safetensors").unlink()  # nothing of the model is read before
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["resample"] = 0
    file.write_text(json.dumps(config))
    words = {"onnx": ["onnx", "--out", str(out)], "plan": ["plan", "onnx"]}[command]
    assert run([*words, "--model", str(folder), "--with-preprocessor"]) == 2
    assert capsys.readouterr().err == (
        "error: --with-preprocessor: the image processor's setting resample=0 has no graph form yet; "
        "export without it and run the processor itself\n"
    )
    assert not out.exists()
