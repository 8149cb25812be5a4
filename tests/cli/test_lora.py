"""--lora from the command line: what is exported and verified is the base with the adapter; `lora` writes its GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.model.adapters import pairs_of, write_adapter
from vlmexport.bench import run as bench
from vlmexport.bench.worker import Contender
from vlmexport.checkpoint_manifest import open_checkpoint
from vlmexport.cli.main import run
from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact, Manifest
from vlmexport.model.load import load_vlm
from vlmexport.verify.checkpoint import changed_tensors

Capture = pytest.CaptureFixture[str]
BOTH_SIDES = ("q_proj", "fc1", "modality_projection.proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def adapter(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of both sides of the tiny model."""
    folder = tmp_path_factory.mktemp("adapter") / "both"
    return write_adapter(folder, pairs_of(load_vlm(str(tiny_idefics3)), BOTH_SIDES), base_model_name_or_path="me/other")


def one_line(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_inspect_tells_of_the_adapter(tiny_idefics3: Path, adapter: Path, capsys: Capture) -> None:
    assert run(["inspect", str(tiny_idefics3), "--lora", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert f"with the adapter merged: {adapter}, 12 weights changed" in out
    assert "names me/other as its base" in out
    assert f"--model {tiny_idefics3} --lora {adapter} --out OUT" in out


@pytest.mark.slow
def test_a_quantized_checkpoint_holds_the_merged_weights(
    tiny_idefics3: Path, adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "q"
    words = ["quantize", "--model", str(tiny_idefics3), "--lora", str(adapter), "--out", str(out), "--quant", "rtn"]
    assert run(words) == 0
    printed = capsys.readouterr().out
    assert "passed source/unchanged" in printed
    assert "names me/other as its base" in printed
    assert "The LoRA adapter `both` is merged" in (out / "README.md").read_text()
    assert not list(out.glob("adapter*"))
    recorded = open_checkpoint(out).source["lora"]
    assert (recorded["path"], recorded["changed"], recorded["untied"]) == (str(adapter), 12, False)
    merged = load_vlm(str(tiny_idefics3), lora=str(adapter)).model
    stored = load_file(out / "model.safetensors")
    for name in ("lm_head.weight", "model.vision_model.encoder.layers.0.mlp.fc1.weight"):
        assert torch.equal(stored[name], merged.get_parameter(name))
    faults = changed_tensors(out, str(tiny_idefics3), open_checkpoint(out))  # as if it were the base's
    assert sorted(faults) == sorted(f"{name} differs" for name in _kept_changes(out, str(adapter), str(tiny_idefics3)))


def _kept_changes(out: Path, adapter: str, model: str) -> list[str]:
    lora = load_vlm(model, lora=adapter).lora
    assert lora is not None
    quantized = {f"{w.module}.weight" for w in open_checkpoint(out).quantized}
    return [name for name in lora.changed if name not in quantized]


@pytest.mark.slow
def test_an_untied_head_has_no_place_in_a_tied_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    from tests.tiny import make_tiny

    model = make_tiny("idefics3", tmp_path / "tied", tied=True)
    adapter = write_adapter(tmp_path / "adapter", pairs_of(load_vlm(str(model)), ["lm_head"]))
    words = ["--model", str(model), "--lora", str(adapter), "--out", str(tmp_path / "q"), "--quant", "rtn", "-q"]
    capsys.readouterr()
    assert run(["quantize", *words]) == 2
    assert "changes the LM head or the embedding" in one_line(capsys)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("command", ["plan onnx", "plan gguf", "onnx", "gguf", "quantize", "sensitivity", "inspect"])
def test_every_command_that_takes_a_model_takes_an_adapter(
    command: str, tiny_idefics3: Path, tmp_path: Path, capsys: Capture
) -> None:
    """They all look at the adapter: one that is not there is refused by each."""
    model = [str(tiny_idefics3)] if command in ("sensitivity", "inspect") else ["--model", str(tiny_idefics3)]
    out = ["--out", str(tmp_path / "out")] if command in ("onnx", "gguf", "quantize") else []
    assert run([*command.split(), *model, *out, "--lora", str(tmp_path / "none"), "-q"]) == 2
    assert "no such folder" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_lora_writes_a_gguf(tmp_path: Path, capsys: Capture) -> None:
    text = [name for name, _ in load_vlm("demo").model.named_modules() if "text_model" in name and "proj" in name]
    adapter = write_adapter(tmp_path / "mine", pairs_of(load_vlm("demo"), text))
    out = tmp_path / "mine.gguf"
    assert run(["lora", str(adapter), "--base", "demo", "--out", str(out), "--outtype", "f16", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["path"], data["arch"], data["alpha"], len(data["changed"])) == (str(out), "llama", 8.0, 28)
    assert {t.tensor_type for t in gguf.GGUFReader(out).tensors} == {gguf.GGMLQuantizationType.F16}
    assert run(["lora", str(adapter), "--base", "demo", "--out", str(out), "-q"]) == 2
    assert "--force" in one_line(capsys)


def test_lora_of_a_vision_adapter_says_what_to_do(tmp_path: Path, capsys: Capture) -> None:
    adapter = write_adapter(tmp_path / "mine", pairs_of(load_vlm("demo"), ["fc1"]))
    assert run(["lora", str(adapter), "--base", "demo", "--out", str(tmp_path / "a.gguf"), "-q"]) == 2
    assert "merge the adapter into an export by --lora" in one_line(capsys)


@pytest.mark.slow
def test_verify_merges_the_adapter_again(tmp_path: Path, capsys: Capture) -> None:
    """The bundled model end to end; without the adapter, or with another one, the same export is red."""
    base = load_vlm("demo")
    ends = ("q_proj", "v_proj", "fc1", "modality_projection.proj")
    adapter = write_adapter(tmp_path / "adapter", pairs_of(base, ends, size=0.02), base_model_name_or_path="demo")
    out = tmp_path / "export"
    words = ["onnx", "--model", "demo", "--lora", str(adapter), "--out", str(out), "--quant", "none"]
    assert run([*words, "--no-verify", "-q"]) == 0
    assert run(["verify", str(out), "-q"]) == 0
    other = write_adapter(tmp_path / "other", pairs_of(base, ends, size=0.03))
    assert run(["verify", str(out), "--lora", str(other), "--json", str(tmp_path / "red.json"), "-q"]) == 3
    checks = json.loads((tmp_path / "red.json").read_text())["checks"]
    failed = {check["name"].partition("[")[0] for check in checks if check["status"] == "failed"}
    assert {"model/source", "vision_encoder/features", "projector/features", "decoder/prefill"} <= failed
    shutil.rmtree(adapter)
    capsys.readouterr()
    assert run(["verify", str(out), "-q"]) == 4
    assert "the original model could not be loaded" in one_line(capsys)


def test_bench_gives_pytorch_the_adapter(tiny_idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    def contenders(recorded: str, asked_for: str | None = None) -> dict[str, Contender]:
        source = {"model": str(tiny_idefics3), "lora": {"path": recorded}}
        export = Artifact(tiny_idefics3, Manifest("split", "cpu", {}, source, {}, {}, {}, (), ()))
        base = Contender("artifact", str(tiny_idefics3), "float32", 1, "", 4)
        question = bench._Question("What is red?", [Image.new("RGB", (32, 32))], tmp_path)
        return bench._contenders(export, None, asked_for, base, question)[0]

    assert {c.lora for name, c in contenders(str(adapter)).items() if name != "artifact"} == {str(adapter)}
    assert set(contenders("/none")) == {"artifact"}  # not measured, with the reason
    with pytest.raises(BadInputError, match="no such folder"):
        contenders(str(adapter), "/none")
