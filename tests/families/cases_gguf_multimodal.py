"""Cases of families whose decoder is told where pictures are: M-RoPE, image blocks, deepstack, short convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.families import tiny_gemma3, tiny_lfm2, tiny_qwen
from tests.families.gguf_proof import Inputs, Proof, export, prove
from tests.families.tiny_text import picture

QUESTIONS = (
    "{image}what is in the picture? a red square above a blue circle.",
    "read the word. {image} where is the green star?",
)


@dataclass(frozen=True)
class MarkedCase:
    """One checkpoint, and a picture that needs no resizing; `keys` change its config.

    `token` stands at the picture's positions; `marks` is the model's input that says where they are.
    """

    family: str
    width: int
    height: int
    token: str
    marks: str = ""
    keys: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The name of the test."""
        return "-".join([self.family, *self.keys])


_QWEN = {"token": "<|image_pad|>", "marks": "mm_token_type_ids"}
CASES = (
    MarkedCase("qwen2_vl", 168, 140, **_QWEN),
    MarkedCase("qwen2_5_vl", 168, 140, **_QWEN),
    MarkedCase("qwen3_vl", 192, 160, **_QWEN),
    MarkedCase("qwen3_vl_moe", 160, 192, **_QWEN),
    MarkedCase("gemma3", 64, 64, "<image_soft_token>", "token_type_ids"),
    MarkedCase("gemma3", 64, 64, "<image_soft_token>", "token_type_ids", {"text": {"final_logit_softcapping": 3.0}}),
    MarkedCase("lfm2_vl", 288, 256, "<image>"),
    MarkedCase("lfm2_vl", 256, 256, "<image>", keys={"projector_use_layernorm": False}),
)


def run_case(case: MarkedCase, folder: Path) -> Proof:
    """Make the checkpoint, export it at F16 and compare it with PyTorch."""
    checkpoint = make_case(case, folder / "model")
    files = export(checkpoint, folder / "out")
    return prove(checkpoint, files, picture(case.width, case.height), QUESTIONS, inputs_of(case, checkpoint))


def make_case(case: MarkedCase, folder: Path) -> Path:
    """Write the checkpoint of `case`."""
    makers: dict[str, Callable[..., Path]] = {
        "gemma3": tiny_gemma3.make_tiny_gemma3,
        "lfm2_vl": tiny_lfm2.make_tiny_lfm2,
    }
    if case.family in makers:
        return makers[case.family](folder, **case.keys)
    return tiny_qwen.make_tiny_qwen(case.family, folder, **case.keys)


def inputs_of(case: MarkedCase, checkpoint: Path) -> Inputs:
    """How the PyTorch model of `case` takes a picture."""
    token = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(case.token)
    pixels: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
        "gemma3": tiny_gemma3.image_inputs,
        "lfm2_vl": tiny_lfm2.image_inputs,
    }

    def where(ids: torch.Tensor) -> torch.Tensor:
        return (ids == token).int()

    marks = {case.marks: where} if case.marks else {}
    if case.family in pixels:
        return lambda image, count: ({**pixels[case.family](image), **marks}, [token] * count)
    patch = 16 if case.family.startswith("qwen3") else 14
    return lambda image, count: ({**tiny_qwen.image_inputs(image, patch), **marks}, [token] * count)
