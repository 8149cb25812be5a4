"""`quantize` on mixture-of-experts decoders: every expert under its own name in the files, exactly once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.tiny import make_tiny
from tests.zoo import registry
from vlmexport import api
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.checkpoint_manifest import CHECKPOINT_MANIFEST_NAME, open_checkpoint
from vlmexport.checkpoint_plan import CheckpointOptions, plan_checkpoint
from vlmexport.cli.quantize import print_result
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.plan_file import AutoLimit
from vlmexport.progress import SilentProgress
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import make_scheme
from vlmexport.split.capture import split_model
from vlmexport.verify.checkpoint import LOSS_CHECK, changed_tensors, miscounted_weights, verify_checkpoint
from vlmexport.verify.checkpoint_codes import read_checkpoint_codes

# Text side -> its keys, and the names of one expert's matrices in its files.
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mixtral": ({"num_local_experts": 3, "num_experts_per_tok": 2}, ("w1", "w2", "w3")),
    "qwen3_moe": (
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        ("gate_proj", "up_proj", "down_proj"),
    ),
}
Sources = dict[str, Path]


def make_source(kind: str, folder: Path, **text: Any) -> Path:
    return make_tiny(
        "llava", folder, text_type=kind, text={**KINDS[kind][0], **text}, dtype="bfloat16", layers=1, vision_layers=1,
        hidden=64, head_dim=16, intermediate=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return {kind: make_source(kind, tmp_path_factory.mktemp("source") / kind) for kind in KINDS}


def options(kind: str, quant: str = "rtn", keep: tuple[str, ...] = (), **scheme: Any) -> CheckpointOptions:
    return CheckpointOptions(kind, make_scheme(quant, **scheme), keep)


def quantize(source: Path, out: Path, chosen: CheckpointOptions, **more: Any) -> Any:
    return api.quantize_checkpoint(str(source), out, chosen, verify=False, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_every_expert_has_its_codes_under_its_own_name(kind: str, form: str, sources: Sources, tmp_path: Path) -> None:
    folder = quantize(sources[kind], tmp_path / "out", options(form)).path
    manifest, before = open_checkpoint(folder), load_file(sources[kind] / "model.safetensors")
    experts = {name for name in before if ".experts." in name}
    assert len(experts) == 9
    assert {f"{w.module}.weight" for w in manifest.quantized} >= experts
    for record, codes, fault in read_checkpoint_codes(folder, manifest):
        assert fault is None
        assert codes is not None
        own = before[f"{record.module}.weight"]  # rows are rounded independently, so the stored tensor is the oracle
        assert codes.digest() == quantize_rtn(own.float(), make_scheme("rtn")).digest(), record.module
    assert miscounted_weights(manifest) == []
    assert changed_tensors(folder, str(sources[kind]), manifest) == []
    written = {n.rpartition(".")[0] for n in load_file(folder / "model.safetensors")}
    assert written == {n.rpartition(".")[0] for n in before}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_experts_and_leaves_routers(kind: str, sources: Sources, tmp_path: Path) -> None:
    manifest = open_checkpoint(quantize(sources[kind], tmp_path / "out", options("compressed-tensors")).path)
    weights = {w["name"]: w for w in manifest.plan["weights"]}
    packed = weights["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert packed["shape"] == [3, 128, 64]
    assert packed["reason"] == "packed experts"
    assert packed["bytes_after"] == 3 * 128 * (64 // 2 + 2 * 2)  # 4-bit codes and a float16 scale for each 32
    router = weights["model.language_model.layers.0.mlp.gate.weight"]
    assert router["reason"] == "router: it chooses among the experts"
    assert sorted(weights) == sorted(n for n, _ in load_vlm(str(sources[kind])).model.named_parameters())


def test_transformers_loads_the_experts_and_computes_the_same(sources: Sources, tmp_path: Path) -> None:
    folder = quantize(sources["qwen3_moe"], tmp_path / "out", options("compressed-tensors")).path
    checks = verify_checkpoint(folder, str(sources["qwen3_moe"]), SilentProgress()).checks
    assert {c.name for c in checks} >= {"codes/complete", "transformers/as_shipped", "transformers/logits"}
    assert {c.status for c in checks if c.name != LOSS_CHECK} == {"passed"}


@pytest.mark.parametrize(
    ("form", "quant", "scheme", "reason"),
    [
        ("bnb-nf4", "nf4", {}, "NF4 weights into linear layers only"),
        ("torchao", "torchao:int4wo", {}, "torchao's tensors into linear layers only"),
        ("compressed-tensors", "rtn", {"symmetric": False}, "no zero points of experts"),
    ],
)
def test_formats_without_experts_say_so(
    form: str, quant: str, scheme: Any, reason: str, sources: Sources, tmp_path: Path
) -> None:
    source, out = sources["mixtral"], tmp_path / "out"
    with pytest.raises(BadInputError, match=reason) as error:
        quantize(source, out, options(form, quant, **scheme))
    assert not out.exists()
    pattern = str(error.value).rpartition("--keep '")[2].removesuffix("'")
    manifest = open_checkpoint(quantize(source, out, options(form, quant, (pattern,), **scheme)).path)
    assert len(manifest.quantized) == 4
    assert changed_tensors(out, str(source), manifest) == []


def test_kept_experts_and_routers_are_listed_by_every_name(sources: Sources, tmp_path: Path) -> None:
    folder = quantize(sources["mixtral"], tmp_path / "out", options("compressed-tensors", keep=("*.down_proj",))).path
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    block = "language_model.model.layers.0.block_sparse_moe"
    assert {f"{block}.experts.{e}.w2" for e in range(3)} <= set(ignore)
    assert not {f"{block}.experts.{e}.w1" for e in range(3)} & set(ignore)
    assert {f"{block}.gate", "model.language_model.layers.0.mlp.gate"} <= set(ignore)
    checks = verify_checkpoint(folder, str(sources["mixtral"]), SilentProgress()).checks
    assert {c.name: c.status for c in checks}["transformers/logits"] == "not_run"
    assert "failed" not in {c.status for c in checks}


def test_what_does_not_take_experts_says_so_before_any_work(sources: Sources, tmp_path: Path) -> None:
    source, out = str(sources["mixtral"]), tmp_path / "out"
    limit = CheckpointOptions("compressed-tensors", make_scheme("awq+gptq"), choice=AutoLimit(max_size=10**6))
    with pytest.raises(BadInputError, match="--quant auto does not measure what rounding packed experts does"):
        quantize(sources["mixtral"], out, limit)
    assert list(tmp_path.iterdir()) == []
    report = api.inspect_model(source)
    assert {target.name for target in report.targets if target.can_export} >= {"cpu", "cuda"}
    assert not {target.name for target in report.targets if target.can_export} & {"tensorrt"}


def test_experts_alike_have_no_names_of_their_own(sources: Sources, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["mixtral"], tmp_path / "twins"))
    tensors = load_file(source / "model.safetensors")
    stem = "language_model.model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    tensors[stem.format(1)] = tensors[stem.format(0)].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"the 3 experts of .*gate_up_proj are not in the model's files"):
        quantize(source, tmp_path / "out", options("compressed-tensors"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def written(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    return Path(quantize(sources["qwen3_moe"], out, options("compressed-tensors")).path)


EXPERT = "language_model.model.layers.0.mlp.experts.{}.up_proj"
Tensors = dict[str, torch.Tensor]


def _drop(tensors: Tensors, records: list[dict[str, Any]]) -> None:
    for name in [n for n in tensors if n.startswith(EXPERT.format(1))]:
        del tensors[name]


def _forget(tensors: Tensors, records: list[dict[str, Any]]) -> None:
    _drop(tensors, records)
    records[:] = [r for r in records if r["module"] != EXPERT.format(1)]


def _repeat(tensors: Tensors, records: list[dict[str, Any]]) -> None:
    records.append(next(r for r in records if r["module"] == EXPERT.format(1)))


def _swap(tensors: Tensors, records: list[dict[str, Any]]) -> None:
    one, other = (f"{EXPERT.format(e)}.weight_packed" for e in (0, 1))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


@pytest.mark.parametrize(
    ("damage", "red"),
    [(_drop, "codes/all"), (_forget, "codes/complete"), (_repeat, "codes/complete"), (_swap, "codes/all")],
)
def test_every_damage_to_one_expert_is_found(
    damage: Callable[[Tensors, list[dict[str, Any]]], None],
    red: str,
    written: Path,
    sources: Sources,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmexport.verify.checkpoint_load.importlib.util.find_spec", lambda name: None)
    folder = Path(shutil.copytree(written, tmp_path / "damaged"))
    tensors, manifest = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / CHECKPOINT_MANIFEST_NAME).read_text()),
    )
    damage(tensors, manifest["quantized"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CHECKPOINT_MANIFEST_NAME).write_text(json.dumps(manifest))
    checks = verify_checkpoint(folder, str(sources["qwen3_moe"]), SilentProgress()).checks
    assert {c.name: c.status for c in checks}[red] == "failed"


def test_a_router_that_is_not_listed_is_found(
    written: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmexport.verify.checkpoint_load.importlib.util.find_spec", lambda name: None)
    folder = Path(shutil.copytree(written, tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].remove("model.language_model.layers.0.mlp.gate")
    (folder / "config.json").write_text(json.dumps(config))
    checks = verify_checkpoint(folder, str(sources["qwen3_moe"]), SilentProgress()).checks
    assert {c.name: c.status for c in checks}["config/ignore"] == "failed"


@pytest.mark.slow
def test_an_expert_that_saw_too_few_tokens_falls_back_and_says_so(tmp_path: Path) -> None:
    source = make_source("qwen3_moe", tmp_path / "source", num_experts=24, num_experts_per_tok=1)
    few = CalibrationOptions(samples=1)
    result = quantize(source, tmp_path / "out", options("compressed-tensors", "awq+gptq"), calibration=few)
    report = result.manifest.calibration
    rows = {name: row for step in report["layers"] for name, row in step["weights"].items() if ".experts." in name}
    assert len(rows) == 48  # 24 experts, two packed matrices each
    fell = {name for name, row in rows.items() if row["fallback"]}
    assert len(fell) > 0
    (line,) = [text for text in report["warnings"] if "fell back to round-to-nearest" in text]
    assert line.startswith(f"{len(fell)} weights fell back")
    console = Console(record=True, width=200)
    print_result(result, console)
    assert line in console.export_text()
    assert miscounted_weights(result.manifest) == []
    unseen = next(n for n in fell if rows[n]["fallback"] == "no calibration token reached it" and "down_proj" in n)
    number = int(unseen.rpartition(".")[2])
    module = f"language_model.model.layers.0.mlp.experts.{number}.down_proj"
    assert any(w.module == module for w in result.manifest.quantized)


@pytest.mark.slow
def test_a_decoder_with_axes_and_early_features_is_planned(tmp_path: Path) -> None:
    """Qwen3-VL-MoE: its positions and early features have axes of their own before the batch."""
    vlm, examples = registry.make("qwen3_vl_moe", tmp_path)
    plan = plan_checkpoint(vlm, split_model(vlm, examples), options("compressed-tensors"))
    packed = [weight for weight in plan.weights if weight.reason == "packed experts"]
    assert {weight.name.rpartition(".")[2] for weight in packed} == {"gate_up_proj", "down_proj"}
    assert all(weight.action == "quantize" for weight in packed)
