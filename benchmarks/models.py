"""The random models of the benchmarks: a small-vision Idefics3, and its text model alone as a Llama."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VISION = {"vision_hidden": 192, "vision_layers": 2, "vision_heads": 3, "image_size": 64, "patch_size": 8}


@dataclass(frozen=True)
class TextSize:
    """Dimensions of a decoder; `dtype` is the checkpoint's."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    dtype: str
    head_dim: int = 64
    vocab: int = 49280


SMALL = TextSize("256m", 576, 30, 9, 3, 1536, "float32")
LARGE = TextSize("1.2b", 2048, 16, 32, 8, 8192, "bfloat16")


@dataclass(frozen=True)
class Models:
    """Two checkpoints with the same text weights."""

    vlm: Path
    llama: Path


def make_models(size: TextSize, folder: Path) -> Models:
    """Make both checkpoints below `folder`, or take them as they are when they are there already."""
    models = Models(folder / f"vlm-{size.name}", folder / f"llama-{size.name}")
    if not models.llama.is_dir():
        for path in (models.vlm, models.llama):
            shutil.rmtree(path, ignore_errors=True)
        _make_vlm(size, models.vlm)
        _extract_llama(models.vlm, models.llama)
    return models


def _make_vlm(size: TextSize, path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.tiny import make_tiny

    make_tiny(
        "idefics3",
        path,
        dtype=size.dtype,
        hidden=size.hidden,
        layers=size.layers,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        intermediate=size.intermediate,
        vocab=size.vocab,
        **VISION,
    )


def _extract_llama(vlm: Path, llama: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    building = llama.with_suffix(".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tensors = {}
    for file in sorted(vlm.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                if name.startswith("model.text_model."):
                    tensors[name.replace("model.text_model.", "model.")] = opened.get_tensor(name)
                elif name == "lm_head.weight":
                    tensors[name] = opened.get_tensor(name)
    save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((vlm / "config.json").read_text())
    config = {**whole["text_config"], "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (building / "config.json").write_text(json.dumps({**config, "dtype": whole.get("dtype", "float32")}, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (vlm / name).is_file():
            shutil.copy(vlm / name, building)
    building.rename(llama)
