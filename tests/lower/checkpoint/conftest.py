"""Checkpoints of one tiny model, written once per session; copy them before changing anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny
from vlmexport import api
from vlmexport.checkpoint_plan import CheckpointOptions
from vlmexport.quantize.scheme import make_scheme

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names in the files differ from the model's (LLaVA), the head is tied, the dtype is bfloat16."""
    return make_tiny("llava", tmp_path_factory.mktemp("source") / "llava", tied=True, dtype="bfloat16")


@pytest.fixture(scope="session")
def write(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write a checkpoint with a format, an algorithm and further arguments of `make_scheme`; the same one only once."""
    made: dict[str, Path] = {}

    def write_checkpoint(kind: str, quant: str = "rtn", keep: tuple[str, ...] = (), **scheme: Any) -> Path:
        key = f"{kind}-{quant}-{keep}-{sorted(scheme.items())}"
        if key not in made:
            out = tmp_path_factory.mktemp("checkpoint") / "out"
            options = CheckpointOptions(kind, make_scheme(quant, **scheme), keep)
            made[key] = api.quantize_checkpoint(str(source), out, options, verify=False).path
        return made[key]

    return write_checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def quantization_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config
