"""`StoredTensors`: the tensors of a folder's safetensors files, by name, read when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmexport.errors import BadInputError

# The dtype names of the safetensors header, and bytes per element.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors by their name in the files; indexing reads one (memory-mapped), the rest reads headers only.

    Raises `BadInputError` when a name is in two files, or where a tensor that is asked for does not exist.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for file in files:
            opened: Any = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118 (a file object, no mapping)
                if name in self._files:
                    raise BadInputError(f"{file}: the tensor {name} is in another weight file too")
                self._files[name] = opened

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise BadInputError(f"the tensor {name} is missing from the weight files")
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        if name not in self._files:
            raise BadInputError(f"the tensor {name} is missing from the weight files")
        return tuple(self._files[name].get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """The size of a tensor in the file, in bytes."""
        kind = str(self._files[name].get_slice(name).get_dtype())
        return math.prod(self.shape(name)) * _BYTES.get(kind, 1)

    def with_suffix(self, suffix: str) -> list[str]:
        """What precedes `suffix` in the names that end with it, in the files' order."""
        return [name.removesuffix(suffix) for name in self._files if name.endswith(suffix)]
