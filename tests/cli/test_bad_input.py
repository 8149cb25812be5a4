"""Bad input of every kind: one clear line, the right exit code, nothing half written, an older export intact."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmexport.cli.main import run
from vlmexport.manifest import open_artifact

Capture = pytest.CaptureFixture[str]


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


REMOTE = {"AutoModelForImageTextToText": "modeling_own.Own"}
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no safetensors": (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights"),
    "pickle only": (only_pickle, "has pickle weights only"),
    "truncated weights": (lambda f: cut_in_half(f / "model.safetensors"), "is damaged or cut off"),
    "text only": (lambda f: edit_json(f / "config.json", model_type="llama"), "is no vision-language model"),
    "unknown": (lambda f: edit_json(f / "config.json", model_type="frob"), "is unknown to transformers"),
    "remote code": (lambda f: edit_json(f / "config.json", model_type="own", auto_map=REMOTE), "--trust-remote-code"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "processor"),
}


def assert_one_line(capsys: Capture, *words: str) -> None:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert out == ""
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1]


@pytest.fixture
def model(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_idefics3, tmp_path / "model"))


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_export, tmp_path / "out" / "export"))


@pytest.mark.parametrize("name", BREAKAGES)
@pytest.mark.parametrize("command", ["plan", "onnx"])
def test_a_bad_model_is_refused(command: str, name: str, model: Path, tmp_path: Path, capsys: Capture) -> None:
    break_it, words = BREAKAGES[name]
    break_it(model)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["plan", "onnx"] if command == "plan" else ["onnx", "--out", str(out / "export")]
    assert run([*arguments, "--model", str(model)]) == 2
    assert_one_line(capsys, words)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", [n for n in BREAKAGES if n != "no tokenizer"])
def test_inspect_refuses_it_too(name: str, model: Path, capsys: Capture) -> None:
    break_it, words = BREAKAGES[name]
    break_it(model)
    assert run(["inspect", str(model)]) == 2
    assert_one_line(capsys, words)


def test_inspect_describes_a_model_that_it_cannot_split(model: Path, capsys: Capture) -> None:
    (model / "tokenizer.json").unlink()
    assert run(["inspect", str(model), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [t["can_export"] for t in report["targets"]] == [False] * len(report["targets"])
    assert "processor" in report["targets"][0]["reason"]


def test_a_group_size_that_does_not_divide(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "export"
    assert run(["onnx", "--model", str(model), "--out", str(out), "--group-size", "256"]) == 2
    assert_one_line(capsys, "input features, not a multiple of group size 256", "choose --group-size")
    assert not out.exists()


def test_a_weight_with_nan(model: Path, tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.text_model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    assert run(["onnx", "--model", str(model), "--out", str(tmp_path / "out" / "export")]) == 2
    assert_one_line(capsys)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_is_never_replaced(model: Path, tmp_path: Path, force: bool, capsys: Capture) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"x")
    assert run(["onnx", "--model", str(model), "--out", str(out), *(["--force"] if force else [])]) == 2
    assert_one_line(capsys, "not empty and not a vlmexport export")
    assert (out / "holiday.jpg").read_bytes() == b"x"


def test_an_older_export_is_refused_without_force(model: Path, export: Path, capsys: Capture) -> None:
    assert run(["onnx", "--model", str(model), "--out", str(export)]) == 2
    assert_one_line(capsys, "--force")
    open_artifact(export)


def test_force_with_a_bad_model_leaves_the_older_export(model: Path, export: Path, capsys: Capture) -> None:
    cut_in_half(model / "model.safetensors")
    assert run(["onnx", "--model", str(model), "--out", str(export), "--force"]) == 2
    assert_one_line(capsys, "cut off")
    open_artifact(export)
    assert list(export.parent.iterdir()) == [export]


@pytest.mark.parametrize("command", ["verify", "bench", "run"])
@pytest.mark.parametrize("kind", ["missing", "foreign", "changed", "newer", "damaged", "escaping"])
def test_what_is_no_sound_export_is_refused(command: str, kind: str, export: Path, capsys: Capture) -> None:
    if kind == "changed" and command == "run":
        pytest.skip("run compares sizes only: hashing gigabytes before every answer would cost more than the answer")
    words = break_export(export, kind)
    arguments = ["--prompt", "?"] if command == "run" else []
    assert run([command, str(export), *arguments]) == 2
    assert_one_line(capsys, words)


def break_export(export: Path, kind: str) -> str:
    manifest = export / "manifest.json"
    if kind == "missing":
        shutil.rmtree(export)
        return "is not a folder"
    if kind == "foreign":
        manifest.unlink()
        return "is not a vlmexport export"
    if kind == "changed":
        data = export / "decoder.onnx_data"
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
        return "decoder.onnx_data was changed"
    if kind == "newer":
        edit_json(manifest, version=99)
        return "upgrade vlmexport"
    if kind == "escaping":
        files = json.loads(manifest.read_text())["files"]
        edit_json(manifest, files={**files, "../../etc/passwd": {"sha256": "0", "bytes": 1}})
        return "outside"
    manifest.write_text(manifest.read_text()[:-20])
    return "not valid JSON"


def test_verify_refuses_a_model_that_was_asked_for_and_is_not_there(export: Path, capsys: Capture) -> None:
    assert run(["verify", str(export), "--model", "/no/such/model"]) == 2
    assert_one_line(capsys, "no such folder: /no/such/model")


def test_verify_refuses_samples_that_are_not_there(export: Path, capsys: Capture) -> None:
    assert run(["verify", str(export), "--samples", "/no/such/file.jsonl"]) == 2
    assert_one_line(capsys, "/no/such/file.jsonl")


@pytest.mark.parametrize("kind", ["missing", "foreign", "corrupt", "empty", "folder"])
def test_a_picture_that_is_none(kind: str, export: Path, tmp_path: Path, capsys: Capture) -> None:
    from PIL import Image

    file = tmp_path / "picture.png"
    if kind == "foreign":
        file.write_text("I am a text.")
    elif kind == "corrupt":
        Image.effect_noise((64, 64), 50).save(file)
        cut_in_half(file)
    elif kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    assert run(["run", str(export), "--image", str(file), "--prompt", "What?"]) == 2
    assert_one_line(capsys, "picture.png")


def export_process(model: Path, out: Path, *, before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nfrom vlmexport.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "onnx", "--model", str(model), "--out", str(out), "--no-verify", "--force"]
    command += ["--quant", "rtn"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has ^C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_and_keeps_the_older_export(model: Path, export: Path) -> None:
    # No file may grow beyond 100 kB: the write fails in the middle of the decoder's weights, as on a full disk.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = export_process(model, export, before=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert err.splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in err
    open_artifact(export)
    assert list(export.parent.iterdir()) == [export]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_and_keeps_the_older_export(model: Path, export: Path) -> None:
    process = export_process(model, export)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("write vision_encoder"):
            break
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(timeout=120) == 1, err
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    open_artifact(export)
    assert list(export.parent.iterdir()) == [export]
