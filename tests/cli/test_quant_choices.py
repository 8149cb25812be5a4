"""Methods that exist and are refused: one line with the reason, before any model is looked at."""

import pytest

from vlmexport.cli.main import run
from vlmexport.quantize.registry import REFUSED


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", [["onnx"], ["plan", "onnx"], ["quantize"]], ids=" ".join)
def test_the_reason_is_told(command: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = [] if command[0] == "plan" else ["--out", "nowhere"]
    assert run([*command, "--model", "no-such-model", *out, "--quant", name]) == 2
    told = capsys.readouterr().err
    assert told == f"error: quantization method {name} is refused: {REFUSED[name]}\n"


def test_an_unknown_method_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "onnx", "--model", "no-such-model", "--quant", "magic"]) == 2
    assert "'torchao:int4wo'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["imported", "awq", "magic"])
def test_sensitivity_offers_what_rounds_without_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sensitivity", "no-such-model", "--quant", name]) == 2
    told = capsys.readouterr().err
    assert f"{name!r} is not one of" in told
    assert "'nf4'" in told
    assert "'imported'," not in told
