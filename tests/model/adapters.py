"""LoRA adapters built by hand in PEFT's format, for tests that must not need PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlmexport.model.load import VLM

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """`tensors` by module names without PEFT's prefix (``lm_head.lora_A.weight``); `config` as LoraConfig's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {PREFIX + name: t.clone().contiguous() for name, t in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return folder


def pair(
    module: str, out: int, columns: int, *, rank: int = 4, size: float = 0.1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """``lora_A`` and ``lora_B`` of a linear layer."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=draw) * columns**-0.5,
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=draw) * size,
    }


def pairs_of(vlm: VLM, ends: Iterable[str], *, rank: int = 4, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Pairs for every 2-D weight whose module's name ends with one of `ends`."""
    found: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in enumerate(vlm.model.named_parameters(remove_duplicate=False)):
        module = name.removesuffix(".weight")
        if parameter.ndim == 2 and module != name and any(module.endswith(end) for end in ends):
            found |= pair(module, *parameter.shape, rank=rank, size=size, seed=number)
    return found
