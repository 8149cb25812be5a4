"""``vlmexport gguf``: what it writes and prints, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmexport.cli.main import run
from vlmexport.manifest import open_artifact

Capture = pytest.CaptureFixture[str]


def test_an_export_has_both_files_and_the_lines_that_run_them(tmp_path: Path, capsys: Capture) -> None:
    out, report = tmp_path / "out", tmp_path / "result.json"
    options = ["--imatrix", "none", "--no-verify", "--json", str(report)]
    assert run(["gguf", "--model", "demo", "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    artifact = open_artifact(out)
    assert artifact.manifest.layout == "gguf"
    text, mmproj = "vlmexport-demo-Q4_K_M.gguf", "mmproj-vlmexport-demo-f16.gguf"
    assert {text, mmproj, "README.md", "config.json"} <= artifact.manifest.files.keys()
    card = (out / "README.md").read_text()
    assert f"llama-mtmd-cli -m {text} --mmproj {mmproj}" in card
    assert f"llama-server -m {text} --mmproj {mmproj}" in card
    assert f"-m {text} --mmproj {mmproj}" in printed
    data = json.loads(report.read_text())
    assert data["bits_per_weight"]["text"] < 5.5
    assert data["report"] is None


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        options = ["--imatrix", "none", "--no-verify", "-q", "--threads", "1" if name == "a" else "2"]
        assert run(["gguf", "--model", "demo", "--out", str(tmp_path / name), *options]) == 0
        digests.append({n: f.sha256 for n, f in open_artifact(tmp_path / name).manifest.files.items()})
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quant", "Q4_K_X"], "choose one of F32"),
        (["--mmproj-type", "q9"], "'q9' is no GGUF file type"),
        (["--tensor-type", "ffn_down"], "REGEX=TYPE"),
        (["--tensor-type", "nothing=Q8_0"], "nothing"),
        (["--imatrix", "nowhere.dat"], "no such file"),
        (["--quant", "awq", "--smooth", "awq"], "smooths by itself"),
    ],
)
def test_bad_choices_are_one_line_and_write_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: Capture
) -> None:
    assert run(["gguf", "--model", "demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_named(tiny_idefics3: Path, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_idefics3, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.text_model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    options = ["--out", str(tmp_path / "out" / "export"), "--imatrix", "none", "--no-verify"]
    assert run(["gguf", "--model", str(model), *options]) == 2
    assert "layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
