"""The command line reference is what the commands say of themselves."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from vlmexport.cli.main import run

ROOT = Path(__file__).parent.parent


def test_the_cli_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("write_cli_reference", ROOT / "tools" / "write_cli_reference.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == tool.reference(), "run `make docs`"


def documented_keys(command: str) -> set[str]:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = text.split(f"## {command}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", section, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"\w+", row)}


@pytest.mark.parametrize("command", ["inspect", "plan onnx", "plan gguf", "doctor", "gguf", "quantize", "sensitivity"])
def test_every_json_key_is_documented(command: str, tiny_llava: Path, tiny_idefics3: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = {
        "inspect": [str(tiny_llava)],
        "plan onnx": ["--model", str(tiny_llava)],
        "plan gguf": ["--model", str(tiny_idefics3)],
        "doctor": [],
        "gguf": ["--model", str(tiny_idefics3), "--out", str(tmp_path / "g"), "--imatrix", "none", "--no-verify"],
        "quantize": ["--model", str(tiny_llava), "--out", str(tmp_path / "q"), "--quant", "rtn", "--no-verify"],
        "sensitivity": [str(tiny_llava), "--calibration-samples", "4"],
    }[command]
    assert run([*command.split(), *arguments, "-q", "--json", str(file)]) == 0
    assert set(json.loads(file.read_text())) == documented_keys(command)


def test_every_key_of_a_calibration_is_documented(tiny_llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    chosen = ["--quant", "awq+gptq", "--calibration-samples", "4", "--no-verify", "-q"]
    assert run(["quantize", "--model", str(tiny_llava), "--out", str(out), *chosen]) == 0
    told = json.loads((out / "vlmexport_quantization.json").read_text())
    text = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    layer = told["calibration"]["layers"][0]
    weight = next(iter(layer["weights"].values()))
    keys = [*told, *told["calibration"], *layer, *weight, *told["quantized"][0]]
    missing = [key for key in keys if f"`{key}`" not in text and key not in ("format", "version")]
    assert not missing
    assert told["folded"], "scales were moved into norms"
