"""A GGUF pair as it lies on disk: metadata, tensors, and what the bytes of a tensor mean.

Read with the gguf library's own reader and dequantized by its numpy code, which shares nothing with ggml's quantizers
that wrote the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import ArtifactError
from vlmexport.quantize.ggml.types import GGML_TYPES

_NAMES = {t.id: name for name, t in GGML_TYPES.items()}
_VALUES_AT_ONCE = 8 << 20
EXACT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: `shape` in numpy order, `type` a name of `GGML_TYPES` (or ``type 39`` for one that is not there).

    `data` is the memory-mapped uint8 ``[rows, row bytes]``.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: NDArray[np.uint8]

    def pieces(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The values as float32 ``[rows, columns]``, some rows at a time, with which rows they are."""
        import gguf

        columns = self.shape[-1] if self.shape else 1
        step = max(1, _VALUES_AT_ONCE // max(columns, 1))
        kind = gguf.GGMLQuantizationType[self.type]
        for start in range(0, len(self.data), step):
            rows = slice(start, min(start + step, len(self.data)))
            yield rows, np.ascontiguousarray(gguf.quants.dequantize(self.data[rows], kind), np.float32)

    def values(self) -> NDArray[np.float32]:
        """All values as float32 of `shape`."""
        parts = [piece for _, piece in self.pieces()]
        return np.concatenate(parts).reshape(self.shape) if parts else np.zeros(self.shape, np.float32)


class GgufFile:
    """An open GGUF file; raises `ArtifactError` when it is none or is damaged."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            self._reader: Any = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ArtifactError(f"{path} is no readable GGUF file: {reason[:200]}") from error

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by name, in the file's order."""
        return {t.name: _stored(t) for t in self._reader.tensors}

    @property
    def arch(self) -> str:
        """``general.architecture``; empty when the file does not say."""
        return str(self.value("general.architecture") or "")

    def keys(self) -> list[str]:
        """The names of all metadata, in the file's order."""
        return [key for key in self._reader.fields if not key.startswith("GGUF.")]

    def value(self, key: str) -> Any:
        """A metadata value as Python data; None when the key is not there."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary's texts, as stored (byte-level BPE: in its own letters)."""
        return list(self.value("tokenizer.ggml.tokens") or [])

    def token(self, key: str) -> str:
        """The text of a special token named by `key` (``bos_token_id``); empty when there is none."""
        index = self.value(f"tokenizer.ggml.{key}")
        return self.tokens[index] if isinstance(index, int) and 0 <= index < len(self.tokens) else ""


@dataclass(frozen=True)
class GgufPair:
    """The two halves of one model."""

    text: GgufFile
    mmproj: GgufFile

    def of(self, file: str) -> GgufFile:
        """The half called ``text`` or ``mmproj``."""
        return self.text if file == "text" else self.mmproj

    def is_rounded(self, file: str) -> bool:
        """True when llama.cpp multiplies matrices of this half with rounded activations (other than F32 and F16)."""
        return any(len(t.shape) > 1 and t.type not in ("F32", "F16") for t in self.of(file).tensors.values())

    def importance(self) -> bool:
        """True when the text half says that an importance matrix guided its rounding."""
        return any(key.startswith("quantize.imatrix.") for key in self.text.keys())  # noqa: SIM118


def _stored(tensor: Any) -> StoredTensor:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = int(tensor.tensor_type)
    data = np.asarray(tensor.data)
    raw = data.reshape(-1, data.shape[-1]) if data.ndim > 1 else data.reshape(1, -1)
    return StoredTensor(tensor.name, shape, _NAMES.get(kind, f"type {kind}"), np.ascontiguousarray(raw).view(np.uint8))
