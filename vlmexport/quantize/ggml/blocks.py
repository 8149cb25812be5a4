"""Values to ggml's blocks and back: ggml's own quantizers in threads, or gguf-py's where the wheel is not installed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.cpu import available_cores
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.quantize.ggml.library import ggml_library, library_path, quantize_chunk
from vlmexport.quantize.ggml.types import GgmlType, ggml_type

_CHUNK = 1 << 19  # values that one task quantizes: enough to make a call cheap, few enough to share out
# What gguf-py's numpy quantizers make where the wheel is not installed.
NUMPY_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
NUMPY_TYPES = frozenset({"F32", "F16", "BF16", *NUMPY_QUANTIZED})


def quantize_rows(
    values: NDArray[Any],
    type_name: str,
    importance: NDArray[np.float32] | None = None,
    *,
    threads: int = 0,
    name: str = "",
) -> NDArray[np.uint8]:
    """`values` ``[rows, cols]`` (float32 or float16) as blocks ``[rows, row bytes]``, byte for byte llama-quantize's.

    `importance` ``[cols]`` are the weights of an importance matrix. `threads` 0 means all cores; the bytes do not
    depend on it. `name` is the tensor's, for messages. Rows are independent, so a large tensor may come in slices.

    Raises `BadInputError` for values that are not finite or that the type cannot hold, for rows that are no whole
    blocks, and for an importance that is missing or unfit; `NotPossibleHereError` when ggml's code is needed and the
    pinned xllamacpp is not installed.
    """
    kind = ggml_type(type_name)
    what = name or f"a tensor of shape {list(values.shape)}"
    _check_values(values, kind, what)
    if importance is not None:
        importance = _checked_importance(importance, values.shape[1], what)
    convert = _converter(kind, importance, what)
    made = np.empty((values.shape[0], values.shape[1] // kind.block * kind.bytes), np.uint8)

    def work(rows: slice) -> None:
        chunk = np.ascontiguousarray(values[rows], np.float32)
        _check_finite(chunk, what)
        made[rows] = convert(chunk)

    _run(work, list(_slices(*values.shape)), threads or available_cores())
    return made


def dequantize_rows(data: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """The float32 values ``[rows, cols]`` of blocks ``[rows, row bytes]``; `BadInputError` for no whole blocks."""
    kind = ggml_type(type_name)
    if data.ndim != 2 or data.shape[1] % kind.bytes:
        raise BadInputError(f"{list(data.shape)} bytes are no rows of {kind.name} blocks of {kind.bytes} bytes")
    data = np.ascontiguousarray(data, np.uint8)
    if kind.name == "F32":
        return data.view(np.float32)
    if kind.name == "F16":
        return data.view(np.float16).astype(np.float32)
    if kind.name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if library_path() is None:
        return _gguf_dequantize(data, kind)
    made = np.empty((data.shape[0], data.shape[1] // kind.bytes * kind.block), np.float32)
    function = getattr(ggml_library(), _dequantize_symbol(kind))
    function(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(made.ctypes.data), ctypes.c_int64(made.size))
    return made


def _check_values(values: NDArray[Any], kind: GgmlType, what: str) -> None:
    if values.ndim != 2 or values.dtype not in (np.float32, np.float16):
        raise TypeError(f"quantize_rows takes float32 or float16 [rows, cols], not {values.dtype} {list(values.shape)}")
    if values.shape[1] % kind.block:
        raise BadInputError(
            f"{what}: rows of {values.shape[1]} values are no whole blocks of {kind.block} ({kind.name})"
        )


def _checked_importance(importance: NDArray[Any], columns: int, what: str) -> NDArray[np.float32]:
    importance = np.ascontiguousarray(importance, np.float32)
    if importance.shape != (columns,):
        raise BadInputError(
            f"{what}: an importance of shape {list(importance.shape)} does not fit rows of {columns} values"
        )
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise BadInputError(f"{what}: its importance has values that are negative or not finite")
    if not importance.any():
        raise BadInputError(
            f"{what}: its importance is zero everywhere, so every value would be lost: calibrate with more"
        )
    return importance


def _check_finite(chunk: NDArray[np.float32], what: str) -> None:
    """A finite sum has finite terms, and is much cheaper than asking each; a sum may overflow without any."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = chunk.sum()
    if not np.isfinite(total) and not np.isfinite(chunk).all():
        raise BadInputError(f"{what} has values that are NaN or infinite: the checkpoint is damaged")


def _converter(
    kind: GgmlType, importance: NDArray[np.float32] | None, what: str
) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    """The function from float32 rows to bytes."""
    if kind.name == "F32":
        return lambda chunk: chunk.view(np.uint8)
    if kind.name == "F16":
        return lambda chunk: _half(chunk, what)
    if kind.name == "BF16":
        return _bfloat16
    if library_path() is None:
        return _gguf_quantizer(kind, importance)
    return _ggml_quantizer(kind, importance, what)


def _half(chunk: NDArray[np.float32], what: str) -> NDArray[np.uint8]:
    with np.errstate(over="ignore"):
        made = chunk.astype(np.float16)
    if not np.isfinite(made).all():
        raise BadInputError(f"{what} has values beyond 65504, the largest of F16: choose BF16 or F32")
    return made.view(np.uint8)


def _bfloat16(chunk: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The upper halves, rounded to nearest even."""
    bits = chunk.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).view(np.uint8)


def _ggml_quantizer(
    kind: GgmlType, importance: NDArray[np.float32] | None, what: str
) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]]:
    library = ggml_library()
    if importance is None and library.ggml_quantize_requires_imatrix(kind.id):
        raise BadInputError(f"{what}: {kind.name} needs the importance of its columns, and there is none")

    def quantize(chunk: NDArray[np.float32]) -> NDArray[np.uint8]:
        made = quantize_chunk(library, chunk, kind.name, importance)
        if not library.ggml_validate_row_data(kind.id, made.ctypes.data, made.nbytes):
            raise BadInputError(
                f"{what} has values too large for the half-precision scales of {kind.name}: choose BF16"
            )
        return made

    return quantize


def _gguf_quantizer(
    kind: GgmlType, importance: NDArray[np.float32] | None
) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]]:
    if kind.name not in NUMPY_QUANTIZED or importance is not None:
        wish = f"{kind.name} with an importance matrix" if importance is not None else kind.name
        raise NotPossibleHereError(
            f"{wish} needs ggml's quantizers: pip install 'vlmexport[gguf]'; without them F32, F16, BF16, "
            f"{', '.join(NUMPY_QUANTIZED)} are possible, with --imatrix none"
        )
    import gguf

    number = gguf.GGMLQuantizationType(kind.id)
    return lambda chunk: gguf.quants.quantize(chunk, number)


def _gguf_dequantize(data: NDArray[np.uint8], kind: GgmlType) -> NDArray[np.float32]:
    import gguf

    made: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.id))
    return made


def _dequantize_symbol(kind: GgmlType) -> str:
    stem = kind.name.lower()
    return f"dequantize_row_{stem.removesuffix('_k')}_K" if stem.endswith("_k") else f"dequantize_row_{stem}"


def _slices(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _run(work: Callable[[slice], None], tasks: list[slice], threads: int) -> None:
    """Do all tasks in up to `threads` threads; the first error of any is raised."""
    if min(threads, len(tasks)) <= 1:
        for task in tasks:
            work(task)
        return
    with ThreadPoolExecutor(min(threads, len(tasks))) as pool:
        list(pool.map(work, tasks))
