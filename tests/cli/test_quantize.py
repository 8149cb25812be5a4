"""What `quantize` makes of its options and of the verdict; the checkpoint itself is tested elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vlmexport import api
from vlmexport.checkpoint_manifest import CheckpointManifest
from vlmexport.checkpoint_plan import CheckpointOptions
from vlmexport.cli.main import run
from vlmexport.cli.quantize import print_result
from vlmexport.manifest import FileRecord
from vlmexport.plan_file import AutoLimit
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize_pipeline import CheckpointResult
from vlmexport.verify.result import Check, ParityReport, Status

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Let `api.quantize_checkpoint` return a made-up checkpoint with a verdict, and remember its arguments."""

    def install(status: Status | None) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def fake(model: str, out: Path, options: CheckpointOptions, **kwargs: Any) -> CheckpointResult:
            seen.update(kwargs, model=model, out=out, options=options)
            files = {"model.safetensors": FileRecord("0", 5), "config.json": FileRecord("1", 2)}
            manifest = CheckpointManifest(
                "awq", {}, {}, {"bytes_before": 10, "bytes_after": 6}, (), (), {}, files=files
            )
            reason = "" if status == "passed" else "w: codes differ"
            report = status and ParityReport((Check("codes/all", "decoder", "lowering", status, "n <=", 1, 0, reason),))
            return CheckpointResult(tmp_path, manifest, report or None)

        monkeypatch.setattr(api, "quantize_checkpoint", fake)
        return seen

    return install


@pytest.mark.parametrize(("status", "exit_code"), [("passed", 0), ("failed", 3), ("not_run", 0), (None, 0)])
def test_the_exit_code_follows_the_checks(
    checkpoint_says: Any, status: Status | None, exit_code: int, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint_says(status)
    file = tmp_path / "result.json"
    assert run(["quantize", "--model", "m", "--out", "x", "--json", str(file)]) == exit_code
    data = json.loads(file.read_text())
    assert data["size_bytes"] == sum(data["files"].values()) == 7
    assert (data["report"] is None) == (status is None)
    out, err = capsys.readouterr()
    assert err == ("error: the gate failed: decoder: w: codes differ\n" if status == "failed" else "")
    assert ("not run codes/all" in out) == (status == "not_run")


def test_a_folder_may_have_any_name(tmp_path: Path, capsys: Capture) -> None:
    manifest = CheckpointManifest("awq", {}, {}, {"bytes_before": 1, "bytes_after": 1}, (), (), ())
    result = CheckpointResult(tmp_path / "a[/]b", manifest, None)
    print_result(result, Console())
    assert "a[/]b" in capsys.readouterr().out.replace("\n", "")


def test_sizes_of_weights_are_compared_with_weights(checkpoint_says: Any, capsys: Capture) -> None:
    checkpoint_says("passed")
    assert run(["quantize", "--model", "m", "--out", "x"]) == 0
    assert "7 B: 0 matrices quantized, 0 kept; weights 10 B -> 5 B." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "quant"),
    [("compressed-tensors", "awq+gptq"), ("gptq", "awq+gptq"), ("awq", "awq+gptq"), ("bnb-nf4", "nf4"),
     ("torchao", "torchao:int4wo")],
)  # fmt: skip
def test_every_format_has_its_own_default(checkpoint_says: Any, kind: str, quant: str) -> None:
    seen = checkpoint_says(None)
    assert run(["quantize", "--model", "m", "--out", "x", "--format", kind, "-q"]) == 0
    assert seen["options"] == CheckpointOptions(kind, make_scheme(quant))


def test_the_options_arrive(checkpoint_says: Any) -> None:
    seen = checkpoint_says(None)
    chosen = ["--format", "gptq", "--quant", "gptq", "--bits", "8", "--group-size", "64", "--asymmetric", "--clip"]
    more = ["--keep", "a.*", "--keep", "b", "--no-verify", "--force", "--trust-remote-code", "--calibration-seed", "4"]
    assert run(["quantize", "--model", "m", "--out", "x", *chosen, *more, "-q"]) == 0
    assert seen["options"] == CheckpointOptions("gptq", make_scheme("gptq", 8, 64, False, True), ("a.*", "b"), True)
    assert (seen["verify"], seen["force"], seen["trust_remote_code"]) == (False, True, True)
    assert seen["calibration"].seed == 4


def test_a_format_refuses_what_it_cannot_hold(capsys: Capture) -> None:
    assert run(["quantize", "--model", "m", "--out", "x", "--format", "awq", "--quant", "awq", "--bits", "8"]) == 2
    assert capsys.readouterr().err.endswith("error: --format awq holds 4 bits, not 8; compressed-tensors holds more\n")


def test_auto_and_its_limit_arrive(checkpoint_says: Any) -> None:
    seen = checkpoint_says(None)
    chosen = ["--quant", "auto", "--max-size", "1.2GB", "--group-size", "64"]
    assert run(["quantize", "--model", "m", "--out", "x", *chosen, "-q"]) == 0
    scheme, limit = make_scheme("awq+gptq", group_size=64), AutoLimit(max_size=1_200_000_000)
    assert seen["options"] == CheckpointOptions("compressed-tensors", scheme, (), True, limit)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["--max-kl", "0.1"], "limits for --quant auto"),
        (["--quant", "auto"], "needs a limit"),
        (["--quant", "auto", "--max-kl", "0.1", "--bits", "8"], "--bits has no effect with --quant auto"),
        (["--plan", "p.json", "--quant", "rtn"], "--quant has no effect with --plan"),
        (["--plan", "missing.json"], "missing.json"),
    ],
)
def test_limits_and_plans_that_make_no_sense(capsys: Capture, chosen: list[str], message: str) -> None:
    assert run(["quantize", "--model", "m", "--out", "x", *chosen]) == 2
    assert message in capsys.readouterr().err
