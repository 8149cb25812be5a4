"""The gate of a quantized checkpoint: green when it is right, and red for every way to break it that is tried here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_tiny
from vlmexport import api
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.checkpoint_manifest import CHECKPOINT_MANIFEST_NAME, open_checkpoint
from vlmexport.checkpoint_plan import CheckpointOptions
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import make_scheme
from vlmexport.verify.checkpoint import LOSS_CHECK, changed_folds, changed_tensors, verify_checkpoint
from vlmexport.verify.result import ParityReport, Status

LAYER = "model.text_model.layers.0.mlp.up_proj"
PACKED = {
    "compressed-tensors": "weight_packed",
    "gptq": "qweight",
    "awq": "qweight",
    "bnb-nf4": "weight",
    "torchao": "_weight_qdata",
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        "idefics3", tmp_path_factory.mktemp("source") / "idefics3", layers=1, vision_layers=1, dtype="bfloat16"
    )


@pytest.fixture(scope="session")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    quant = {"bnb-nf4": "nf4", "torchao": "torchao:int4wo"}

    def write(kind: str) -> Path:
        if kind not in made:
            options = CheckpointOptions(kind, make_scheme(quant.get(kind, "rtn")))
            made[kind] = api.quantize_checkpoint(
                str(source), tmp_path_factory.mktemp("made") / kind, options, verify=False
            ).path
        return made[kind]

    return write


def judge(folder: Path, source: Path) -> dict[str, Status]:
    report: ParityReport = verify_checkpoint(folder, str(source), SilentProgress())
    statuses = {check.name: check.status for check in report.checks}
    assert statuses.pop(LOSS_CHECK) == "not_run"  # nobody is told that it passed
    return statuses


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(file)
    metadata = _metadata(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata=metadata)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copy(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(written(kind), tmp_path / kind))


@pytest.mark.parametrize("kind", ["compressed-tensors", "torchao", "bnb-nf4"])
def test_transformers_loads_it_and_computes_the_same(kind: str, written: Any, source: Path) -> None:
    if kind == "bnb-nf4":
        pytest.importorskip("accelerate", reason="transformers loads bitsandbytes checkpoints with accelerate only")
    statuses = judge(written(kind), source)
    assert {"source/unchanged", "transformers/as_shipped", "transformers/logits"} <= set(statuses)
    assert set(statuses.values()) == {"passed"}


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_what_cannot_be_loaded_here_is_not_run(
    kind: str, written: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmexport.verify.checkpoint_load.importlib.util.find_spec", lambda name: None)
    statuses = judge(written(kind), source)
    loading = ("processor/inputs", "transformers/as_shipped", "transformers/logits")
    assert [statuses.pop(name) for name in loading] == ["not_run"] * 3
    assert set(statuses.values()) == {"passed"}


@pytest.mark.parametrize("kind", PACKED)
def test_one_changed_integer_is_found(kind: str, copy: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(kind)
    monkeypatch.setattr("vlmexport.verify.checkpoint_load.importlib.util.find_spec", lambda name: None)

    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.reshape(-1)[7] ^= 1
        return tensor

    change_tensor(folder, f"{LAYER}.{PACKED[kind]}", flip)
    statuses = judge(folder, source)
    assert statuses["codes/all"] == "failed"
    assert statuses["source/unchanged"] == "passed"


def test_a_changed_vision_weight_is_found(copy: Any, source: Path) -> None:
    folder = copy("compressed-tensors")
    change_tensor(folder, "model.connector.modality_projection.proj.weight", lambda t: t * 1.01)
    statuses = judge(folder, source)
    assert statuses["source/unchanged"] == "failed"
    assert statuses["transformers/logits"] == "failed"


def test_a_changed_fold_is_found(source: Path, tmp_path: Path) -> None:
    options = CheckpointOptions("gptq", make_scheme("awq"))
    calibration = CalibrationOptions(samples=2)
    folder = api.quantize_checkpoint(str(source), tmp_path / "awq", options, calibration=calibration, verify=False).path
    fold = open_checkpoint(folder).folded[0].file_name
    assert judge(folder, source)["source/folded"] == "passed"
    change_tensor(folder, fold, lambda t: t * 2)
    statuses = judge(folder, source)
    assert [name for name, status in statuses.items() if status == "failed"] == ["source/folded"]
    rest = load_file(folder / "model.safetensors")
    del rest[fold]
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    assert changed_folds(folder, open_checkpoint(folder))[0] == f"{fold} is missing"


def test_a_layer_missing_in_ignore_is_found(copy: Any, source: Path) -> None:
    folder = copy("compressed-tensors")
    change_config(folder, lambda c: c["ignore"].remove("lm_head"))
    statuses = judge(folder, source)
    assert statuses["config/ignore"] == "failed"
    assert statuses["transformers/load"] == "failed"


def test_a_missing_scale_is_found(copy: Any, source: Path) -> None:
    folder = copy("compressed-tensors")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{LAYER}.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    statuses = judge(folder, source)
    assert statuses["codes/all"] == "failed"
    assert statuses["transformers/load"] == "failed"


def test_files_that_the_model_is_not_loaded_from_are_no_part_of_it(written: Any, source: Path, tmp_path: Path) -> None:
    folder = written("gptq")
    model = Path(shutil.copytree(source, tmp_path / "model"))
    save_file({"layers.0.wq": torch.ones(2)}, model / "consolidated.safetensors")
    manifest = open_checkpoint(folder)
    assert changed_tensors(folder, str(model), manifest) == []
    change_tensor(model, "model.connector.modality_projection.proj.weight", lambda t: t * 1.01)
    assert changed_tensors(folder, str(model), manifest) == ["model.connector.modality_projection.proj.weight differs"]


def test_transformers_loads_it_without_a_word(written: Any, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    judge(written("compressed-tensors"), source)
    assert "it/s" not in capfd.readouterr().err


def test_another_processor_is_found(copy: Any, source: Path) -> None:
    folder = copy("compressed-tensors")
    file = folder / "processor_config.json"
    data = json.loads(file.read_text())
    data["image_processor"]["image_mean"] = [0.4, 0.4, 0.4]
    file.write_text(json.dumps(data))
    assert judge(folder, source)["processor/inputs"] == "failed"


def test_a_folder_without_manifest_is_refused(tmp_path: Path, source: Path) -> None:
    from vlmexport.errors import ArtifactError

    with pytest.raises(ArtifactError, match=CHECKPOINT_MANIFEST_NAME):
        verify_checkpoint(tmp_path, str(source), SilentProgress())
