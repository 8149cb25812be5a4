"""What `onnx` and `verify` make of the gate's verdict; the gate itself is tested in tests/verify."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlmexport import api
from vlmexport.cli.main import run
from vlmexport.manifest import open_artifact
from vlmexport.pipeline import ExportResult
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.verify.result import Check, ParityReport, Status

Capture = pytest.CaptureFixture[str]


def report_with(status: Status) -> ParityReport:
    reason = "" if status == "passed" else "the scales differ"
    checks = (
        Check("decoder/prefill", "decoder", "lowering", status, "rel <=", 0.5, 1e-5, reason),
        Check("quantization/kl", "model", "quantization", "passed", "nats <=", 0.01, 0.05),
    )
    return ParityReport(checks)


@pytest.fixture
def export_says(monkeypatch: pytest.MonkeyPatch, tiny_export: Path) -> Any:
    """Let `api.export_onnx` return the tiny export with a verdict, and remember its arguments."""

    def install(status: Status | None) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def fake(model: str, out: Path, options: OnnxOptions, **kwargs: Any) -> ExportResult:
            seen.update(kwargs, model=model, out=out, options=options)
            return ExportResult(open_artifact(tiny_export), None if status is None else report_with(status))

        monkeypatch.setattr(api, "export_onnx", fake)
        return seen

    return install


@pytest.mark.parametrize(("status", "exit_code"), [("passed", 0), ("failed", 3), ("not_run", 0), (None, 0)])
def test_the_exit_code_follows_the_gate(
    export_says: Any, status: Status | None, exit_code: int, tmp_path: Path, capsys: Capture
) -> None:
    export_says(status)
    file = tmp_path / "result.json"
    assert run(["onnx", "--model", "m", "--out", "x", "--json", str(file)]) == exit_code
    data = json.loads(file.read_text())
    assert (data["report"] is None) == (status is None)
    assert data["size_bytes"] == sum(data["files"].values())
    err = capsys.readouterr().err
    assert err == ("error: the gate failed: decoder: the scales differ\n" if status == "failed" else "")


def test_the_options_arrive(export_says: Any, capsys: Capture) -> None:
    seen = export_says(None)
    arguments = [
        "--bits",
        "8",
        "--group-size",
        "64",
        "--asymmetric",
        "--encoder-dtype",
        "fp32",
        "--decoder-dtype",
        "fp16",
    ]
    more = ["--lm-head", "fp16", "--attention", "standard", "--target", "cuda", "--keep", "a.*", "--keep", "b"]
    flags = ["--no-verify", "--force", "--trust-remote-code"]
    assert run(["onnx", "--model", "m", "--out", "x", *arguments, *more, *flags, "-q"]) == 0
    assert seen["options"] == OnnxOptions(
        target="cuda",
        scheme=QuantScheme(bits=8, symmetric=False, group_size=64, algorithm="awq+gptq"),
        encoder_dtype="fp32",
        decoder_dtype="fp16",
        lm_head="fp16",
        attention="standard",
        keep=("a.*", "b"),
        scheme_named=True,
    )
    assert (seen["verify"], seen["force"], seen["trust_remote_code"]) == (False, True, True)


def test_the_defaults_are_those_of_the_contract(export_says: Any) -> None:
    seen = export_says(None)
    assert run(["onnx", "--model", "m", "--out", "x", "-q"]) == 0
    assert seen["options"] == OnnxOptions(scheme=QuantScheme(4, True, 32, "awq+gptq"))
    assert (seen["verify"], seen["force"], seen["trust_remote_code"]) == (True, False, False)


def test_quant_none_is_no_scheme(export_says: Any) -> None:
    seen = export_says(None)
    assert run(["onnx", "--model", "m", "--out", "x", "--quant", "none", "-q"]) == 0
    assert seen["options"].scheme is None


def test_verify_exits_4_when_something_could_not_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(api, "verify_artifact", lambda *_a, **_k: report_with("not_run"))
    assert run(["verify", "x", "-q"]) == 4
    assert "1 checks did not run: decoder/prefill: the scales differ" in capsys.readouterr().err
    assert run(["verify", "x", "-q", "--allow-not-run"]) == 0


@pytest.mark.parametrize(("status", "exit_code"), [("passed", 0), ("failed", 3)])
def test_verify_writes_its_reports_whatever_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: Status, exit_code: int
) -> None:
    monkeypatch.setattr(api, "verify_artifact", lambda *_a, **_k: report_with(status))
    files = {f"--{kind}": tmp_path / f"gate.{kind}" for kind in ("junit", "html", "json")}
    assert run(["verify", "x", *(str(word) for pair in files.items() for word in pair)]) == exit_code
    assert all(file.stat().st_size for file in files.values())
    assert json.loads(files["--json"].read_text())["status"] == status


@pytest.mark.slow
def test_export_and_gate_of_a_tiny_model(tiny_llava: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "verify.json"
    # Random weights have near ties everywhere, so a limit on the loss of quantization would judge the luck of the draw.
    assert run(["onnx", "--model", str(tiny_llava), "--out", str(out), "--quant", "none", "-q"]) == 0
    assert run(["verify", str(out), "-q", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["status"] == "passed"
