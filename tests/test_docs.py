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
    return set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))


@pytest.mark.parametrize("command", ["inspect", "plan onnx", "doctor"])
def test_every_json_key_is_documented(command: str, tiny_llava: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    model = {"inspect": [str(tiny_llava)], "plan onnx": ["--model", str(tiny_llava)], "doctor": []}[command]
    assert run([*command.split(), *model, "-q", "--json", str(file)]) == 0
    assert set(json.loads(file.read_text())) == documented_keys(command)
