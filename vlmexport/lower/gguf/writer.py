"""`GgufFile`: a GGUF file written by the gguf library, its tensors streamed in the order that was announced."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from vlmexport.gguf_options import GgufTensor
from vlmexport.model.family import MetaValue

logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)


class GgufFile:
    """A GGUF file (version 3, little endian) that is being written; a context manager.

    `metadata` and `tensors` are announced at once, since they stand before the data; then `write` must be called for
    every tensor in the same order. `tensors` hold the shapes (numpy order), types and byte counts.
    """

    def __init__(self, path: Path, arch: str, metadata: Mapping[str, MetaValue], tensors: Iterable[GgufTensor]) -> None:
        self._writer: Any = gguf.GGUFWriter(path, arch)
        self._left = {t.name: t.bytes for t in tensors}
        for key, value in metadata.items():
            _add(self._writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            self._writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, kind)

    def __enter__(self) -> GgufFile:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._file = self._writer.fout[0]
        self._writer.write_padding(self._file, self._file.tell())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if error is None and self._left:
            raise ValueError(f"tensors were announced but not written: {', '.join(self._left)}")

    def write(self, name: str, chunks: Iterable[NDArray[Any]]) -> None:
        """Write the data of the next tensor, `chunks` of its rows in order.

        Raises ValueError when it is not the next one or has another size than was announced.
        """
        expected = next(iter(self._left), None)
        if name != expected:
            raise ValueError(f"{name} is written where {expected} was announced")
        size = 0
        for chunk in chunks:
            data = np.ascontiguousarray(chunk)
            self._file.write(data.data)
            size += data.nbytes
        if size != self._left.pop(name):
            raise ValueError(f"{name} has {size} bytes, not as many as were announced")
        self._writer.write_padding(self._file, size)


def _add(writer: Any, key: str, value: MetaValue) -> None:
    """One key with the type that `MetaValue` stands for (see `vlmexport.model.family.GgufHalf`)."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
