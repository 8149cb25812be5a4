"""What llama.cpp's converter writes of our tiny checkpoints, in ``references/``, and what our rules make of them.

Made by ``python tools/make_gguf_family_references.py PATH/TO/llama.cpp``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.families.tiny_gemma3 import make_tiny_gemma3
from tests.families.tiny_lfm2 import make_tiny_lfm2
from tests.families.tiny_qwen import FAMILIES, make_tiny_qwen
from vlmexport.gguf_options import File, GgufPlan, GgufTensor
from vlmexport.quantize.ggml import values

FOLDER = Path(__file__).parent / "references"
HASH_DIGITS = 12
BUILDERS: dict[str, Callable[[Path], Path]] = {
    **{family: partial(make_tiny_qwen, family) for family in FAMILIES},
    "gemma3": make_tiny_gemma3,
    "lfm2_vl": make_tiny_lfm2,
}


@dataclass(frozen=True)
class Reference:
    """One file of the converter's: tensors as (shape, type, start of the SHA-256 of their bytes), and its own keys."""

    tensors: Mapping[str, tuple[tuple[int, ...], str, str]]
    metadata: Mapping[str, Any]


def read_reference(family: str, file: File) -> Reference:
    """What the converter wrote of `family`."""
    data = json.loads((FOLDER / f"{family}.json").read_text())[file]
    tensors = {name: (tuple(shape), kind, start) for name, (shape, kind, start) in data["tensors"].items()}
    return Reference(tensors, data["metadata"])


def fingerprint(array: NDArray[Any]) -> str:
    """The start of the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:HASH_DIGITS]


def our_tensors(weights: Mapping[str, Any], plan: GgufPlan, file: File) -> dict[str, NDArray[np.float32]]:
    """The tensors of one file of `plan` in float32."""
    return {tensor.name: _values(weights, tensor) for tensor in plan.of(file)}


def _values(weights: Mapping[str, Any], tensor: GgufTensor) -> NDArray[np.float32]:
    kind, arguments = (tensor.transform.kind, tensor.transform.arguments) if tensor.transform else (None, ())
    made = values.apply(weights[tensor.source].detach(), kind, arguments)[tensor.output]
    return np.asarray(made.float().contiguous().numpy())


def tensor_differences(weights: Mapping[str, Any], plan: GgufPlan, file: File) -> list[str]:
    """Names of tensors that only one side has, or that differ in shape or value."""
    family = FAMILY_OF[plan.architecture]
    theirs, ours = read_reference(family, file).tensors, our_tensors(weights, plan, file)
    differing = set(theirs) ^ set(ours)
    for name in set(theirs) & set(ours):
        shape, kind, start = theirs[name]
        stored = ours[name].astype(np.float16 if kind == "F16" else np.float32)
        if stored.shape != shape or fingerprint(stored) != start:
            differing.add(name)
    return sorted(differing)


def key_differences(plan: GgufPlan, file: File) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, as (ours, theirs); None where one side has no such key."""
    theirs = read_reference(FAMILY_OF[plan.architecture], file).metadata
    ours = plan.metadata[file]
    return {key: pair for key in {*ours, *theirs} if not _same(*(pair := (ours.get(key), theirs.get(key))))}


def _same(ours: Any, theirs: Any) -> bool:
    if ours is None or theirs is None or isinstance(ours, str):
        return bool(ours == theirs)
    return np.shape(ours) == np.shape(theirs) and bool((np.float32(ours) == np.float32(theirs)).all())


FAMILY_OF = {
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Lfm2VlForConditionalGeneration": "lfm2_vl",
}
