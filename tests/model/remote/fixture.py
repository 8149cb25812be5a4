"""Tiny checkpoints whose model class ships with them; the code in ``code`` is our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.tiny import randomise
from vlmexport.model.load import load_vlm

CODE = Path(__file__).parent / "code"
IMAGE_TOKEN = 300
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}


def make_remote(
    folder: Path, class_name: str, module: str = "modeling_own", auto: str = "AutoModelForCausalLM", **more: Any
) -> Path:
    """Write a checkpoint of `class_name` to `folder`, which `auto` names in its ``auto_map``.

    `more` goes into the config. Its weights are those that the class itself wants, made by its own code here.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder.mkdir(parents=True)
    for file in CODE.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    config: dict[str, Any] = {
        "model_type": "own_vlm",
        "architectures": [class_name],
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig", auto: f"{module}.{class_name}"},
        "text_config": TEXT,
        "image_token_id": IMAGE_TOKEN,
        "dtype": "float32",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    made: Any = get_class_from_dynamic_module(f"{module}.{class_name}", str(folder))
    torch.manual_seed(0)
    model = made(made.config_class.from_pretrained(folder))
    if model.get_output_embeddings() is not None:  # `randomise` scales the head; such a model is never run
        randomise(model, 0)
    save_weights(model, folder)
    return folder


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """The weights of `model` as one file, tied ones once."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def examples() -> tuple[dict[str, torch.Tensor], ...]:
    """Inputs of the whole model: one picture, one of another shape, two pictures."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for count, height, width in ((1, 32, 32), (1, 16, 48), (2, 24, 32)):
        rows = count * (height // 8) * (width // 8)
        before, after = (torch.randint(10, 290, (1, n), generator=generator) for n in (3, 5))
        ids = torch.cat([before, torch.full((1, rows), IMAGE_TOKEN), after], dim=1)
        pixels = torch.randn(count, 3, height, width, generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return tuple(made)


def load(folder: Path) -> Any:
    """The checkpoint with its code allowed to run."""
    return load_vlm(str(folder), trust_remote_code=True)
