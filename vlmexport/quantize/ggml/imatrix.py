"""`ImportanceMatrix`: llama.cpp's importance matrix, and both of its file formats (tools/imatrix/imatrix.cpp).

The GGUF form has ``<tensor>.in_sum2`` (F32, sums of squared inputs per column; a row for every expert) and
``<tensor>.counts`` (F32, rows of input that were summed), in the order of their names, after the keys
``general.type = imatrix``, ``imatrix.datasets``, ``imatrix.chunk_count`` and ``imatrix.chunk_size``. (llama-imatrix
adds sums of the inputs themselves and statistics for people; no quantizer reads them.) The older form (``.dat``) holds
means, times a number of chunks, without the number of experts.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError

# Tokens of a chunk as llama-imatrix counts them, when a matrix was not made from chunks.
CHUNK_TOKENS = 512
_SUMS, _COUNTS, _PLAIN_SUMS, _STATS = ".in_sum2", ".counts", ".in_sum", ".stats"
_MAGIC = b"GGUF"
_LONGEST_NAME = 1 << 10


@dataclass(frozen=True)
class ColumnPower:
    """Of one tensor: `sums` of squared inputs, float32 ``[matrices, columns]``; `counts` of rows, int64 ``[matrices]``.

    `counts` has one number for all matrices in files that do not tell them apart; `sums` is ``[1, matrices * columns]``
    then.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]

    def means(self) -> NDArray[np.float32]:
        """Mean squares in `sums`' shape, 1 for a matrix that saw nothing, as llama-quantize reads them."""
        counts = self.counts.astype(np.float32)[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """How much every column of a model's matrices counts, by GGUF tensor name.

    `datasets` say what it was measured on, in `chunks` of `chunk_tokens` tokens.
    """

    powers: Mapping[str, ColumnPower]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = CHUNK_TOKENS

    @cached_property
    def entries(self) -> dict[str, NDArray[np.float32]]:
        """Mean of the squared inputs, float32 ``[columns]``, or ``[matrices, columns]`` for more than one matrix."""
        means = {name: power.means() for name, power in self.powers.items()}
        return {name: mean[0] if len(mean) == 1 else mean for name, mean in means.items()}


def chunks_of(powers: Mapping[str, ColumnPower], chunk_tokens: int = CHUNK_TOKENS) -> int:
    """The chunks that the largest count stands for, rounded as llama-imatrix does."""
    most = max((int(power.counts.max()) for power in powers.values()), default=0)
    return (most + chunk_tokens // 2) // chunk_tokens


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of llama.cpp's, of either form.

    Raises `BadInputError` naming `path` when it cannot be read, is no importance matrix, or holds sums and counts that
    do not belong together, are not finite, or are negative.
    """
    try:
        with path.open("rb") as file:
            modern = file.read(len(_MAGIC)) == _MAGIC
        matrix = _read_gguf(path) if modern else _read_legacy(path)
    except OSError as error:
        raise BadInputError(f"--imatrix {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise BadInputError(f"--imatrix {path}: not an importance matrix of llama.cpp's: {error}") from error
    for name, power in matrix.powers.items():
        if not np.isfinite(power.sums).all() or (power.sums < 0).any() or (power.counts < 0).any():
            raise BadInputError(f"--imatrix {path}: {name} has values that are negative or not finite")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.get_field("general.type")
    if kind is None or kind.contents() != "imatrix":
        what = "nothing" if kind is None else repr(kind.contents())
        raise ValueError(f"its general.type is {what}, not 'imatrix'")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    powers: dict[str, ColumnPower] = {}
    for name in sorted(tensors):
        stem, _, leaf = name.rpartition(".")
        if f".{leaf}" in (_SUMS, _COUNTS):
            powers[stem] = _power(stem, tensors)
        elif f".{leaf}" not in (_PLAIN_SUMS, _STATS):
            raise ValueError(f"its tensor {name} is neither sums nor counts")
    if not powers:
        raise ValueError("it has no entries")
    return ImportanceMatrix(
        powers,
        tuple(_field(reader, "imatrix.datasets", [])),
        int(_field(reader, "imatrix.chunk_count", 0)),
        int(_field(reader, "imatrix.chunk_size", 0)) or CHUNK_TOKENS,
    )


def _field(reader: Any, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _power(stem: str, tensors: Mapping[str, Any]) -> ColumnPower:
    missing = [leaf for leaf in (_SUMS, _COUNTS) if stem + leaf not in tensors]
    if missing:
        raise ValueError(f"{stem} has no {missing[0].removeprefix('.')}")
    sums, counts = (np.array(tensors[stem + leaf].data) for leaf in (_SUMS, _COUNTS))
    if sums.dtype != np.float32 or counts.dtype != np.float32:
        raise ValueError(f"{stem} is not stored as F32")
    if not counts.size or sums.size % counts.size:
        raise ValueError(f"{stem} has {sums.size} sums and {counts.size} counts")
    if not np.isfinite(counts).all():
        raise ValueError(f"{stem} has counts that are not finite")
    rows = np.rint(counts.reshape(-1)).astype(np.int64)
    return ColumnPower(sums.reshape(rows.size, -1), rows)


def _read_legacy(path: Path) -> ImportanceMatrix:
    """int32 entries; each int32 length, name, int32 chunks, int32 values, float32 values; then chunks and dataset."""
    size = path.stat().st_size
    with path.open("rb") as file:
        entries = _int(file)
        if not 0 < entries <= size:
            raise ValueError(f"it would have {entries} entries")
        powers: dict[str, ColumnPower] = {}
        for _ in range(entries):
            name = _text(file, _int(file))
            calls, count = _int(file), _int(file)
            if not 0 < count <= size // 4:
                raise ValueError(f"{name} would have {count} values")
            sums = np.frombuffer(_bytes(file, 4 * count), "<f4").astype(np.float32)
            powers[name] = ColumnPower(sums[None], np.array([max(calls, 1)], np.int64))
        tail = file.read(4)
        chunks = struct.unpack("<i", tail)[0] if tail else 0
        datasets = (_text(file, _int(file)),) if tail and file.tell() < size else ()
    return ImportanceMatrix(powers, datasets, chunks)


def _bytes(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it ends too early")
    return data


def _int(file: BinaryIO) -> int:
    return int(struct.unpack("<i", _bytes(file, 4))[0])


def _text(file: BinaryIO, length: int) -> str:
    if not 0 <= length <= _LONGEST_NAME:
        raise ValueError(f"a name would have {length} bytes")
    return _bytes(file, length).decode()


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write `matrix` as a GGUF file that ``llama-quantize --imatrix`` reads."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # llama-imatrix writes none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_tokens)
    for name in sorted(matrix.powers):
        power = matrix.powers[name]
        one = len(power.counts) == 1
        counts = power.counts.astype(np.float32)
        writer.add_tensor(name + _SUMS, power.sums[0] if one else power.sums)
        writer.add_tensor(name + _COUNTS, counts if one else counts[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_legacy_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write `matrix` in the older form, as ``llama-imatrix --output-format dat`` does.

    An expert that saw nothing gets ones, and a tensor without any data is left out.
    """
    kept = {name: matrix.powers[name] for name in sorted(matrix.powers) if matrix.powers[name].counts.any()}
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(kept)))
        for name, power in kept.items():
            calls = -(-int(power.counts.max()) // matrix.chunk_tokens)
            values = power.means() * np.float32(calls)
            text = name.encode()
            file.write(struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, values.size))
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
        dataset = (matrix.datasets[-1] if matrix.datasets else "").encode()
        file.write(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)
