"""Checkpoints quantized by encoders of our own, written from the formats' descriptions with numpy and plain loops.

Nothing here is shared with the package: neither its importers nor its emitters. compressed-tensors and bitsandbytes
checkpoints are packed by those libraries themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codes:
    """Codes uint8 ``[N, K]``, float16 scales and integer zero points ``[N, K/g]``: ``(codes - zero) * scale``."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group: int

    def meaning(self) -> np.ndarray:
        scale, zero = (np.repeat(x.astype(np.float32), self.group, axis=1) for x in (self.scale, self.zero))
        return (self.codes.astype(np.float32) - zero) * scale


def draw_codes(shape: tuple[int, int], bits: int, group: int, symmetric: bool, seed: int) -> Codes:
    """Random codes of which every value occurs, with the spread of a trained matrix."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    groups = (rows, columns // group)
    spread = columns**-0.5 * 4 / (1 << bits)
    scale = (spread * rng.uniform(0.5, 1.5, groups)).astype(np.float16)
    middle = 1 << (bits - 1)
    zero = np.full(groups, middle) if symmetric else rng.integers(0, 1 << bits, groups)
    return Codes(codes, scale, zero, bits, group)


def bit_words(values: np.ndarray, bits: int) -> np.ndarray:
    """``[rows, n]`` values end to end from the low bits in int32 ``[rows, ceil(n * bits / 32)]``, a bit at a time."""
    rows, count = values.shape
    stream = np.zeros((rows, -(-count * bits // 32) * 32), np.uint8)
    for bit in range(bits):
        stream[:, bit : count * bits : bits] = (values >> bit) & 1
    words = np.packbits(stream.reshape(rows, -1, 32), axis=-1, bitorder="little")
    return words.view("<u4").reshape(rows, -1).view(np.int32)


def gptq_tensors(codes: Codes, offset: int) -> Tensors:
    """GPTQ's four tensors; `offset` 1 is version 1 (zero points stored minus one), 0 is version 2."""
    stored = (codes.zero - offset) % (1 << codes.bits)
    columns = codes.codes.shape[1]
    return {
        "qweight": torch.from_numpy(bit_words(codes.codes, codes.bits).T.copy()),
        "qzeros": torch.from_numpy(bit_words(stored.T, codes.bits)),
        "scales": torch.from_numpy(codes.scale.T.copy()),
        "g_idx": torch.arange(columns, dtype=torch.int32) // codes.group,
    }


def awq_tensors(codes: Codes) -> Tensors:
    """AWQ GEMM's three tensors, by the double loop of the format's description."""

    def pack(matrix: np.ndarray) -> torch.Tensor:
        out = np.zeros((matrix.shape[0], matrix.shape[1] // 8), np.int64)
        for word in range(out.shape[1]):
            for place, column in enumerate(AWQ_ORDER):
                out[:, word] |= matrix[:, 8 * word + column].astype(np.int64) << (4 * place)
        return torch.from_numpy(out.astype(np.uint32).view(np.int32))

    return {
        "qweight": pack(codes.codes.T),
        "qzeros": pack(codes.zero.T),
        "scales": torch.from_numpy(codes.scale.T.copy()),
    }


def is_decoder_linear(name: str) -> bool:
    inside = ("text_model." in name or "language_model." in name) and ".layers." in name
    return inside and name.endswith("_proj.weight")


Encode = Callable[[str, torch.Tensor], Tensors | None]


def rewrite(source: Path, folder: Path, encode: Encode, quantization: dict[str, Any]) -> Path:
    """Copy `source` with every weight for which `encode` gives tensors (by local name) replaced by those."""
    shutil.copytree(source, folder)
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        made = encode(name, tensor)
        if made is None:
            tensors[name] = tensor
        else:
            tensors.update({name.removesuffix("weight") + kind: t.contiguous() for kind, t in made.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


class Drawn:
    """An `Encode` that draws codes for the decoder's linears and remembers them by the checkpoint's name."""

    def __init__(self, pack: Callable[[Codes], Tensors], bits: int, group: int, symmetric: bool) -> None:
        self.codes: dict[str, Codes] = {}
        self._pack, self._bits, self._group, self._symmetric = pack, bits, group, symmetric

    def __call__(self, name: str, tensor: torch.Tensor) -> Tensors | None:
        if not is_decoder_linear(name):
            return None
        rows, columns = tensor.shape
        drawn = draw_codes((rows, columns), self._bits, self._group, self._symmetric, len(self.codes))
        self.codes[name] = drawn
        return self._pack(drawn)


def gptq_config(bits: int, group: int, symmetric: bool, version: str = "gptq") -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False,
            "checkpoint_format": version}  # fmt: skip


def make_gptq(
    source: Path, folder: Path, *, bits: int = 4, group: int = 32, symmetric: bool = True, version: str = "gptq"
) -> tuple[Path, dict[str, Codes]]:
    offset = 1 if version == "gptq" else 0
    drawn = Drawn(lambda codes: gptq_tensors(codes, offset), bits, group, symmetric)
    return rewrite(source, folder, drawn, gptq_config(bits, group, symmetric, version)), drawn.codes


def make_awq(source: Path, folder: Path, *, group: int = 32, symmetric: bool = False) -> tuple[Path, dict[str, Codes]]:
    drawn = Drawn(awq_tensors, 4, group, symmetric)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not symmetric, "version": "gemm"}
    return rewrite(source, folder, drawn, config), drawn.codes
