import json
from pathlib import Path

import pytest

from vlmexport.cli.main import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    file = tmp_path / "picture.png"
    Image.effect_noise((48, 32), 60).convert("RGB").save(file)
    return file


def ask(export: Path, picture: Path, *more: str) -> int:
    return run(["run", str(export), "--image", str(picture), "--prompt", "What?", "--max-new-tokens", "4", *more])


def test_the_answer_goes_to_stdout(tiny_export: Path, picture: Path, capsys: Capture) -> None:
    assert ask(tiny_export, picture) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert err == ""


def test_json_takes_stdout_and_the_answer_goes_to_stderr(tiny_export: Path, picture: Path, capsys: Capture) -> None:
    assert ask(tiny_export, picture, "--json", "-") == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert set(data) == {"text", "token_ids", "prompt_tokens", "timings"}
    assert 1 <= len(data["token_ids"]) <= 4
    assert err == data["text"] + "\n"


def test_a_seed_makes_a_drawn_answer_repeatable(tiny_export: Path, picture: Path, capsys: Capture) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        assert ask(tiny_export, picture, "--temperature", "3", "--seed", seed, "--json", "-") == 0
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1] != answers[2]


def test_no_pytorch_model_is_loaded(tiny_export: Path, picture: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from vlmexport.cli.main import run\n"
        f"code = run(['run', {str(tiny_export)!r}, '--image', {str(picture)!r}, '--prompt', '?', '-q'])\n"
        "assert code == 0\n"
        "models = [m for m in sys.modules if m.startswith('transformers.models.')]\n"
        "loaded = [m for m in models if '.modeling_' in m and not m.endswith('.modeling_auto')]  # a table of names\n"
        "assert loaded == [], loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
