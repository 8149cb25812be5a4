"""The cases that are proved in llama.cpp: a family, a picture's size, its text config."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.families.gguf_proof import Inputs, Proof, export, prove
from tests.families.tiny_gguf import make_checkpoint, normalised, picture, stretched_pixels, tile_batch, tiled_pixels

PROMPTS = (
    "<|im_start|>User:{image} what is in the picture?<end_of_utterance>\nAssistant:",
    "{image}read the word.",
    "how many shapes are there? {image} three?",
)
LONG_PROMPT = f"<|im_start|>User:{'a red square above a blue circle. ' * 12}{{image}} where is it?"

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 48}


@dataclass(frozen=True)
class Case:
    """One checkpoint, the picture's width and height, and what its text config has of its own."""

    family: str
    width: int = 32
    height: int = 32
    text: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = PROMPTS

    def __str__(self) -> str:
        """The name of the test."""
        return "-".join([self.family, *(f"{k}={v}" for k, v in self.text.items() if isinstance(v, str | int))])


CASES = (
    Case("idefics3", 64, 64),
    Case("idefics3", 50, 38, {"tie_word_embeddings": True}),
    Case("smolvlm", 64, 32),
    Case("llava", 100, 60),
    Case("llava", 48, 64, {"text_type": "mistral", "sliding_window": None}),
    Case("llava", text={"text_type": "qwen2"}),
    Case("llava", text={"text_type": "qwen3", "head_dim": 48}),
    Case("llava", text={"rope_parameters": LLAMA3, **BIASES}, prompts=(*PROMPTS, LONG_PROMPT)),
    Case("llava", text={"rope_parameters": YARN}, prompts=(*PROMPTS, LONG_PROMPT)),
    Case("llava", text={"rope_parameters": LINEAR}, prompts=(*PROMPTS, LONG_PROMPT)),
    Case("llava", text={"text_type": "qwen2", "rope_parameters": {**YARN, "attention_factor": 1.5}}),
    Case("pixtral", 48, 32),
    Case("mistral3", 64, 48),
    Case("ministral3", 64, 48, prompts=(*PROMPTS, LONG_PROMPT)),
    Case("internvl", 64, 64, {"text_type": "qwen2"}),
    Case("internvl", text={"text_type": "qwen3", "head_dim": 32}),
    Case("internvl", text={"text_type": "llama"}),
)


def run_case(case: Case, folder: Path) -> Proof:
    """Make the checkpoint, export it at F16 and compare it with PyTorch."""
    checkpoint = make_checkpoint(case.family, folder / "model", **case.text)
    files = export(checkpoint, folder / "out")
    image = picture(case.width, case.height)
    return prove(checkpoint, files, image, case.prompts, inputs_of(case, checkpoint))


def inputs_of(case: Case, checkpoint: Path) -> Inputs:
    """How the PyTorch model of `case` takes a picture."""
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if case.family in _PATCH:
        return _rows_of_patches(case, settings, tokenizer)
    prepare = {"llava": stretched_pixels, "internvl": tile_batch}.get(case.family, tiled_pixels)
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>" if case.family == "internvl" else "<image>")
    return lambda image, count: ({"pixel_values": prepare(image, settings)}, [image_token] * count)


_PATCH = {"pixtral": ("<image>", 8), "mistral3": ("[IMG]", 16), "ministral3": ("[IMG]", 16)}


def _rows_of_patches(case: Case, settings: dict[str, Any], tokenizer: Any) -> Inputs:
    """Pixtral's: a break token behind each row of patches but the last."""
    name, side = _PATCH[case.family]
    patch, end = tokenizer.convert_tokens_to_ids([name, "[IMG_BREAK]"])
    ids = ([patch] * (case.width // side) + [end]) * (case.height // side)
    sizes = torch.tensor([[case.height, case.width]])
    return lambda image, _: ({"pixel_values": normalised(image, settings), "image_sizes": sizes}, ids[:-1])
