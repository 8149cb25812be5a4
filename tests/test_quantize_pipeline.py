"""The whole way of `quantize`: what is in the folder, what is refused, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_tiny
from vlmexport import api
from vlmexport.calibrate import auto
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.checkpoint_manifest import open_checkpoint
from vlmexport.checkpoint_plan import FORMATS, CheckpointOptions, plan_checkpoint
from vlmexport.errors import BadInputError
from vlmexport.manifest import file_sha256
from vlmexport.model.load import load_vlm
from vlmexport.plan_file import AutoLimit, load_plan_file
from vlmexport.quantize.scheme import make_scheme
from vlmexport.split.capture import split_model
from vlmexport.verify.checkpoint import unlisted_layers
from vlmexport.verify.checkpoint_codes import read_checkpoint_codes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny(
        "llava", tmp_path_factory.mktemp("source") / "llava", tied=True, dtype="bfloat16", layers=2, vision_layers=1
    )
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/else\n---\n# Mine\n")
    return folder


def options(kind: str, quant: str | None = None, keep: tuple[str, ...] = (), **scheme: Any) -> CheckpointOptions:
    default = {"bnb-nf4": "nf4", "torchao": "torchao:int4wo"}.get(kind, "rtn")
    return CheckpointOptions(kind, make_scheme(quant or default, **scheme), keep)


def quantize(source: Path, out: Path, chosen: CheckpointOptions, **more: Any) -> Any:
    return api.quantize_checkpoint(str(source), out, chosen, verify=False, **more)


@pytest.mark.parametrize("kind", FORMATS)
def test_everything_but_the_decoders_linear_layers_is_copied(kind: str, source: Path, tmp_path: Path) -> None:
    folder = quantize(source, tmp_path / "out", options(kind)).path
    manifest = open_checkpoint(folder)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    quantized = {f"{w.module}.weight" for w in manifest.quantized}
    assert len(quantized) == 14
    assert all(name.startswith("language_model.model.layers.") for name in quantized)
    for name in before.keys() - quantized:
        assert before[name].dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
    assert "lm_head.weight" not in after  # tied
    assert unlisted_layers(folder, manifest) == []
    linears = {n for n, m in load_vlm(str(source)).model.named_modules() if isinstance(m, torch.nn.Linear)}
    named = {w.name.removesuffix(".weight") for w in manifest.quantized}
    assert set(manifest.plan["unquantized_linears"]) == linears - named
    assert "lm_head" in manifest.plan["unquantized_linears"]
    listed = [entry.name for entry in (*manifest.unquantized, *manifest.quantized)]
    assert sorted(listed) == sorted(name for name, _ in load_vlm(str(source)).model.named_parameters())


def test_the_folder_is_complete(source: Path, tmp_path: Path) -> None:
    folder = quantize(source, tmp_path / "out", options("compressed-tensors")).path
    assert {p.name for p in source.iterdir()} <= {p.name for p in folder.iterdir()}
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: someone/else" in card
    assert "rtn, 4 bits, symmetric, groups of 32" in card
    own = json.loads((source / "config.json").read_text())
    made = json.loads((folder / "config.json").read_text())
    assert made.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert made == own
    manifest = open_checkpoint(folder)
    assert all(file_sha256(folder / name) == record.sha256 for name, record in manifest.files.items())


def test_the_same_command_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    one, two = (quantize(source, tmp_path / name, options("gptq")).manifest for name in ("a", "b"))
    assert one == two


def test_kept_layers_are_listed(source: Path, tmp_path: Path) -> None:
    folder = quantize(source, tmp_path / "out", options("awq", keep=("*.layers.0.*",))).path
    manifest = open_checkpoint(folder)
    assert len(manifest.quantized) == 7
    skipped = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.language_model.layers.0.mlp.up_proj" in skipped
    assert "language_model.model.layers.0.mlp.up_proj" in skipped
    assert {k.reason for k in manifest.unquantized if "language_model.layers.0.mlp" in k.name} == {
        "--keep *.layers.0.*"
    }


@pytest.mark.parametrize(
    ("kind", "quant", "scheme", "message"),
    [
        ("awq", "rtn", {"bits": 8}, "--format awq holds 4 bits, not 8"),
        ("awq", "nf4", {}, "--format awq takes --quant awq\\+gptq, awq, gptq, hqq, rtn, not nf4"),
        ("bnb-nf4", "rtn", {}, "--format bnb-nf4 takes --quant nf4, nf4:nested, not rtn"),
        ("torchao", "rtn", {}, "--format torchao takes --quant torchao:int4wo"),
        ("gptq", "fp8", {}, "--format gptq takes"),
    ],
)
def test_a_format_says_what_it_takes(kind: str, quant: str, scheme: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        quantize(tmp_path / "no-model", tmp_path / "out", options(kind, quant, **scheme))


def test_nothing_left_to_quantize_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no weight is left to be quantized"):
        quantize(source, tmp_path / "out", options("compressed-tensors", keep=("*",)))
    assert list(tmp_path.iterdir()) == []


def test_one_scheme_for_all_layers_where_the_format_has_no_more(tmp_path: Path) -> None:
    from dataclasses import replace

    scheme = replace(make_scheme("rtn"), overrides={"*.down_proj": make_scheme("rtn", group_size=64)})
    with pytest.raises(BadInputError, match="compressed-tensors hold"):
        quantize(tmp_path / "no-model", tmp_path / "out", CheckpointOptions("awq", scheme))


def test_a_group_size_that_does_not_divide_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="128 input features, not a multiple of group size 256"):
        quantize(source, tmp_path / "out", options("gptq", group_size=256))
    assert not (tmp_path / "out").exists()


def test_another_method_for_a_quantized_model_is_refused(source: Path, tmp_path: Path) -> None:
    folder = quantize(source, tmp_path / "once", options("compressed-tensors")).path
    with pytest.raises(BadInputError, match="already quantized"):
        quantize(folder, tmp_path / "twice", options("gptq"))


def test_a_folder_of_ours_is_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(source, out, options("gptq"))
    with pytest.raises(BadInputError, match="--force"):
        quantize(source, out, options("awq"))
    assert quantize(source, out, options("awq"), force=True).manifest.checkpoint_format == "awq"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match="not empty"):
        quantize(source, tmp_path / "theirs", options("awq"), force=True)


@pytest.mark.slow
def test_a_limit_is_met_by_a_plan_that_the_folder_holds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "HELD_OUT_SAMPLES", 8)
    vlm = load_vlm(str(source))
    split = split_model(vlm)
    low, high = (
        plan_checkpoint(vlm, split, options("compressed-tensors", bits=bits)).to_dict()["bytes_after"]
        for bits in (4, 8)
    )
    limit = AutoLimit(max_size=(low + high) // 2)
    chosen = dataclasses.replace(options("compressed-tensors"), choice=limit)
    few = CalibrationOptions(samples=8)
    result = quantize(source, tmp_path / "out", chosen, calibration=few)
    assert {w.bits for w in result.manifest.quantized} == {4, 8}
    assert result.manifest.plan["bytes_after"] <= (low + high) // 2
    plan = load_plan_file(result.path / "quantization_plan.json")
    assert plan == result.quant_plan
    assert result.manifest.plan["options"]["choice"] is None
    again = quantize(source, tmp_path / "again", CheckpointOptions("compressed-tensors", make_scheme(), choice=plan))
    assert again.manifest.quantized == result.manifest.quantized
    assert not [f for _, _, f in read_checkpoint_codes(again.path, again.manifest) if f is not None]
    with pytest.raises(BadInputError, match="--format gptq holds one scheme for all layers; compressed-tensors holds"):
        quantize(source, tmp_path / "gptq", CheckpointOptions("gptq", make_scheme(), choice=plan))
    other = make_tiny("llava", tmp_path / "other", tied=True, dtype="float32", layers=2, vision_layers=1)
    with pytest.raises(BadInputError, match="the plan was made for other weights than those of"):
        quantize(other, tmp_path / "third", CheckpointOptions("compressed-tensors", make_scheme(), choice=plan))
    converted = quantize(source, tmp_path / "rtn", options("gptq")).path
    with pytest.raises(BadInputError, match="quantized already and keeps its codes; leave --quant auto and --plan out"):
        quantize(converted, tmp_path / "fourth", chosen, calibration=few)


@pytest.mark.parametrize("kind", [name for name, f in FORMATS.items() if not f.mixed])
def test_a_format_of_one_scheme_has_nothing_to_choose(kind: str, tmp_path: Path) -> None:
    chosen = dataclasses.replace(options(kind), choice=AutoLimit(max_kl=0.1))
    with pytest.raises(BadInputError, match=f"--format {kind} holds one scheme.*--quant auto has nothing to choose"):
        quantize(tmp_path / "no-model", tmp_path / "out", chosen)
