"""The border of the process: lazy start, one line and one exit code per error."""

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

from vlmexport import api
from vlmexport.cli.main import COMMANDS, run
from vlmexport.errors import ArtifactError, BadInputError, GateFailedError, NotPossibleHereError, VlmExportError

HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "PIL", "rich", "safetensors", "huggingface_hub")


def test_no_help_imports_anything_heavy() -> None:
    calls = [["--help"], *([name, "--help"] for name in COMMANDS), ["plan", "onnx", "--help"]]
    code = (
        "import sys; from vlmexport.cli.main import run\n"
        f"assert not any(run(a) for a in {calls!r})\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, vlmexport, vlmexport.api; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def raising(error: BaseException) -> Callable[[], None]:
    def examine() -> None:
        raise error

    return examine


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (VlmExportError("broken"), 1),
        (BadInputError("wrong option"), 2),
        (ArtifactError("no export"), 2),
        (GateFailedError("red"), 3),
        (NotPossibleHereError("no GPU"), 4),
    ],
)
def test_our_errors_are_one_line_and_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: VlmExportError, exit_code: int
) -> None:
    monkeypatch.setattr(api, "examine_machine", raising(error))
    assert run(["doctor"]) == exit_code
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx_data"), 4, "no room left to write x.onnx_data"),
        (OSError(errno.EFBIG, "File too large"), 4, "no room left to write"),
        (MemoryError(), 4, "this machine has not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "/out: Permission denied"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (ZeroDivisionError("ours\nof two lines"), 1, "internal error: ZeroDivisionError: ours (run again with -v"),
        (KeyError(), 1, "internal error: KeyError"),
    ],
)
def test_other_errors_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, exit_code: int, line: str
) -> None:
    monkeypatch.setattr(api, "examine_machine", raising(error))
    assert run(["doctor"]) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    # After ^C the terminal's line is ended first.
    assert err.strip().startswith(f"error: {line}")
    assert err.strip().count("\n") == 0


def test_verbose_shows_the_traceback_of_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "examine_machine", raising(ZeroDivisionError("ours")))
    assert run(["doctor", "-v"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: internal error")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["onnx", "--model", "demo"], "Missing option '--out'"),
        (["onnx", "--model", "demo", "--out", "x", "--bits", "5"], "Invalid value for '--bits'"),
        (["onnx", "--model", "demo", "--out", "x", "--group-size", "48"], "group size is 48"),
        (["onnx", "--model", "demo", "--out", "x", "--target", "toaster"], "Invalid value for '--target'"),
        (["onnx", "--model", "demo", "--out", "x", "--quant", "none", "--bits", "8"], "--bits has no effect"),
        (["plan", "onnx", "--model", "demo", "--bits", "3"], "target cpu refuses 3-bit weights"),
        (["run", "x", "--prompt", "?", "--top-p", "2"], "Invalid value for '--top-p'"),
        (["doctor", "-v", "-q"], "--verbose and --quiet exclude each other"),
        (["doctor", "--nope"], "No such option"),
    ],
)
def test_wrong_usage_is_one_line_and_2(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_no_command_prints_the_help() -> None:
    done = subprocess.run([sys.executable, "-m", "vlmexport"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Commands:" in done.stderr


def test_a_closed_pipe_is_silent() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m vlmexport doctor | true"], capture_output=True, text=True
    )
    assert done.stderr == ""
