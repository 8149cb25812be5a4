"""The wheel's shared object: found, pinned, checked, loaded once."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vlmexport.errors import NotPossibleHereError
from vlmexport.quantize.ggml import library


def test_the_library_is_the_installed_wheels_and_loaded_once_for_all_threads() -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: library.ggml_library(), range(8)))

    assert len({id(one) for one in loaded}) == 1
    assert library.require_library() == library.library_path()


def test_a_missing_wheel_is_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda _: None)

    assert library.library_path() is None
    with pytest.raises(NotPossibleHereError, match=r"pip install 'vlmexport\[gguf\]' \(xllamacpp 2026"):
        library.ggml_library()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.metadata, "version", lambda _: "2027.1.1")

    with pytest.raises(NotPossibleHereError, match=f"xllamacpp 2027.1.1 is installed.*{library.PINNED} only"):
        library.ggml_library()


class _Wrong:
    """A library whose blocks of one type have one bit wrong."""

    def __init__(self, kind: int) -> None:
        self._real, self._kind = library.ggml_library(), kind

    def ggml_quantize_chunk(self, kind: int, source: int, target: int, *rest: object) -> int:
        size: int = self._real.ggml_quantize_chunk(kind, source, target, *rest)
        if kind == self._kind:
            made: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(target))
            made[size // 2] ^= 1
        return size


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_library_that_makes_other_bytes_is_refused(name: str) -> None:
    from vlmexport.quantize.ggml.types import ggml_type

    with pytest.raises(NotPossibleHereError, match=f"makes other {name} blocks than llama-quantize b11549"):
        library.check_library(_Wrong(ggml_type(name).id), "/there")  # type: ignore[arg-type]


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "xllamacpp.abi3.so"
    file.write_bytes(b"no library")

    with pytest.raises(NotPossibleHereError, match=f"{file} cannot be used"):
        library._load(file)


def test_a_library_without_ggml_is_refused() -> None:
    import _ctypes

    with pytest.raises(NotPossibleHereError, match=r"cannot be used .*ggml_quantize_chunk"):
        library._load(Path(_ctypes.__file__))
