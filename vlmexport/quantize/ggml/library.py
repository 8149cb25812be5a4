"""ggml's own code, from the shared object in the xllamacpp wheel, loaded by ctypes.

The wheel promises no C interface, so one version is pinned, and the library must reproduce known bytes before it is
used.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from functools import cache
from importlib import metadata
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import NotPossibleHereError
from vlmexport.quantize.ggml.types import ggml_type

PINNED = "2026.10.11549"
LLAMA_CPP_BUILD = "b11549"
_INSTALL = "pip install 'vlmexport[gguf]'"
_SUFFIXES = (".so", ".pyd", ".dylib")

# SHA-256 of what `_probe` becomes, as the pinned wheel and llama-quantize b11549 make it.
_KNOWN = {
    "Q4_0": "762f19e4101918eff404a4743ed77c8cb804128a96f5f7e5c760aed7aeced0c0",
    "Q8_0": "9b17391658117ddaba903492aeade4296a29cd0a0daa170720100f93ee091906",
    "Q3_K": "1e13a1762992e346e7e13cce009745bd42886f589b1084ef367aa131209edec3",
    "Q4_K": "46230eca09b2f152684085ac798a58ca9496a636467bd1c4e76a6a7cc96e66e7",
    "Q6_K": "75369c57475c0172c192e40d519d28c7f0cb2f21a0105f6a57c149b687f94cc2",
    "IQ4_XS": "351de53fe43759c844bbae077347f8d054710f5d6fdeefa3bc922c40eb7d972d",
}

_lock = Lock()


def library_path() -> Path | None:
    """The shared object of the installed xllamacpp, of whatever version; None when it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = sorted(file for folder in folders for file in folder.glob("xllamacpp*") if file.suffix in _SUFFIXES)
    return found[0] if found else None


def require_library() -> Path:
    """The shared object of the pinned xllamacpp; `NotPossibleHereError` when it or this version is not installed."""
    path = library_path()
    if path is None:
        raise NotPossibleHereError(f"llama.cpp is not installed here: {_INSTALL} (xllamacpp {PINNED})")
    version = _installed_version()
    if version != PINNED:
        raise NotPossibleHereError(
            f"xllamacpp {version} is installed, but its C interface is known of {PINNED} only: {_INSTALL}"
        )
    return path


def ggml_library() -> ctypes.CDLL:
    """ggml, loaded once for all threads, its block functions declared and checked against known bytes.

    Raises `NotPossibleHereError` when the pinned wheel is not installed, or computes other bytes than llama-quantize.
    """
    with _lock:
        return _load(require_library())


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise NotPossibleHereError(f"{path} cannot be used ({error}): reinstall it, {_INSTALL}") from error
    check_library(library, str(path))
    return library


def _installed_version() -> str:
    try:
        return metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _declare(library: ctypes.CDLL) -> None:
    """The signatures of ggml.h that are called here."""
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    )
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)


def quantize_chunk(
    library: ctypes.CDLL, values: NDArray[np.float32], type_name: str, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """The blocks that ggml makes of contiguous `values` ``[rows, cols]``, cols whole blocks; ``[rows, row bytes]``.

    Nothing is checked: where ggml asserts (a type that needs `importance` ``[cols]`` has none), the process ends.
    """
    kind = ggml_type(type_name)
    rows, columns = values.shape
    made = np.empty((rows, columns // kind.block * kind.bytes), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(kind.id, values.ctypes.data, made.ctypes.data, 0, rows, columns, weights)
    return made


def check_library(library: ctypes.CDLL, where: str) -> None:
    """Raise `NotPossibleHereError` unless `library` makes the known bytes of every probed type."""
    values, importance = _probe()
    for name, known in _KNOWN.items():
        made = quantize_chunk(library, values, name, importance if name.startswith("IQ") else None)
        if hashlib.sha256(made.tobytes()).hexdigest() != known:
            raise NotPossibleHereError(
                f"{where} makes other {name} blocks than llama-quantize {LLAMA_CPP_BUILD}, so its bytes cannot be "
                f"trusted: reinstall xllamacpp {PINNED}, {_INSTALL}"
            )


def _probe() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two rows of 256 values and their importance: small integers, whose sums float32 holds without rounding."""
    index = np.arange(512)
    values = (index * 37 % 31 - 15) * (1 + index // 32 % 3)
    return values.astype(np.float32).reshape(2, 256), (1 + np.arange(256) % 4).astype(np.float32)
