"""F32, F16, BF16 and Q8_0 files against the real converter's (tools/make_gguf_converter_reference.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.quantize.ggml.sources import all_sources
from vlmexport.quantize.ggml.blocks import quantize_rows
from vlmexport.quantize.ggml.library import LLAMA_CPP_BUILD
from vlmexport.quantize.ggml.mix import choose_types

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "converter.json").read_text(encoding="utf-8"))
SOURCES = {source.half: source for source in all_sources() if source.real}
# The converter keeps what a checkpoint of SmolVLM calls embeddings in F32; a family says so (`GgufHalf.always_f32`).
OF_THE_FAMILY = ("v.patch_embd.weight", "v.position_embd.weight")


@pytest.mark.parametrize("half", ["text", "mmproj"])
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
def test_types_and_bytes_are_the_converters(half: Literal["text", "mmproj"], quant: str) -> None:
    source, wanted = SOURCES[half], REFERENCE["files"][f"{half} {quant}"]
    chosen = choose_types(source.tensors, quant, source.facts, half=half)
    made = {}
    for name in source.shapes:
        kind = "F32" if name in OF_THE_FAMILY else chosen[name].type
        values = source.original(name)
        rows = values.reshape(1, -1) if kind in ("F32", "F16", "BF16") else values.reshape(-1, values.shape[-1])
        made[name] = f"{kind} {hashlib.sha256(quantize_rows(rows, kind).tobytes()).hexdigest()[:12]}"

    assert made == wanted


def test_the_reference_is_of_the_pinned_llama_cpp() -> None:
    assert REFERENCE["made_by"] == f"convert_hf_to_gguf.py {LLAMA_CPP_BUILD}"
    assert len(REFERENCE["files"]) == 8
