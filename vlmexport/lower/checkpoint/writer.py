"""A safetensors writer that never holds more than one tensor.

The library's own `save_file` wants all tensors at once. Here every tensor is appended to a spool file as it comes; the
header, which stands in front of the data and needs all sizes, is written when the last one is there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.checkpoint import INDEX_NAME, WEIGHTS_NAME

# Hugging Face's usual limit of one weight file.
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Elements of larger dtypes come first in a file, so that every tensor starts at a multiple of its element size.
_ELEMENT_SIZES = (8, 4, 2, 1)


@dataclass
class _Shard:
    """One file in the making: a spool per element size, and ``(name, header entry, bytes)`` in the order written."""

    spools: dict[int, Path]
    entries: dict[int, list[tuple[str, dict[str, Any], int]]] = field(
        default_factory=lambda: {size: [] for size in _ELEMENT_SIZES}
    )
    size: int = 0


class SafetensorsWriter:
    """Writes ``model.safetensors`` into a folder, or shards of at most `max_bytes` with their index.

    Call `add` for every tensor, then `finish` once.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._shards: list[_Shard] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append `tensor` (any device, made contiguous).

        Raises ValueError for a name that is there already, `UnsupportedModelError` for a dtype that is not written.
        """
        if name in self._names:
            raise ValueError(f"{name} is written twice")
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModelError(f"{name} is {tensor.dtype}, which is not copied into a checkpoint")
        self._names.add(name)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        shard = self._shard_for(raw.nbytes)
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        size = tensor.element_size()
        with shard.spools[size].open("ab") as spool:
            raw.tofile(spool)
        shard.entries[size].append((name, entry, raw.nbytes))
        shard.size += raw.nbytes

    def finish(self, metadata: dict[str, str]) -> list[str]:
        """Write the files, each with `metadata` in its header (``format`` is added), and return their names."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        total = 0
        names = []
        for index, shard in enumerate(self._shards, start=1):
            name = WEIGHTS_NAME if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"
            self._compose(shard, self._folder / name, {"format": "pt", **metadata})
            weight_map.update({entry[0]: name for entries in shard.entries.values() for entry in entries})
            total += shard.size
            names.append(name)
        if count > 1:
            index_data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX_NAME).write_text(json.dumps(index_data, indent=2) + "\n", encoding="utf-8")
        return names

    def _shard_for(self, size: int) -> _Shard:
        if not self._shards or self._shards[-1].size + size > self._max_bytes:
            stem = f".shard{len(self._shards)}"
            self._shards.append(_Shard({size: self._folder / f"{stem}.{size}" for size in _ELEMENT_SIZES}))
        return self._shards[-1]

    @staticmethod
    def _compose(shard: _Shard, path: Path, metadata: dict[str, str]) -> None:
        """Header, then the spools, largest element first; follows the safetensors format's own layout."""
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for size in _ELEMENT_SIZES:
            for name, entry, length in shard.entries[size]:
                header[name] = {**entry, "data_offsets": [offset, offset + length]}
                offset += length
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for size in _ELEMENT_SIZES:
                if shard.spools[size].is_file():
                    with shard.spools[size].open("rb") as spool:
                        shutil.copyfileobj(spool, file, 1 << 24)
                    shard.spools[size].unlink()
