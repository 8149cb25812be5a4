import json
from pathlib import Path

import pytest

from vlmexport.cli.main import run
from vlmexport.cli.session import Session, write_atomically
from vlmexport.errors import BadInputError
from vlmexport.progress import SilentProgress


def test_json_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert "findings" in json.loads(out)
    assert "torch" in err


def test_json_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert run(["doctor", "--json", str(file)]) == 0
    assert json.loads(file.read_text()).keys() == {"findings"}
    assert "torch" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_reports_no_progress() -> None:
    with Session(quiet=True).progress() as progress:
        assert isinstance(progress, SilentProgress)


def test_a_failed_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")

    def full(self: Path, *_args: object, **_kwargs: object) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_json_file_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        write_atomically(tmp_path / "no" / "x.json", "{}")


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Session().progress() as progress, progress.stage("quantize", total=2) as stage:
        stage.advance(1, "layer 0")
    assert capsys.readouterr() == ("", "quantize (2)\n")
