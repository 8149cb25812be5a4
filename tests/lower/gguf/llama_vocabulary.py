"""llama.cpp's own tokenizer, from the wheel by ctypes, over a GGUF that holds nothing but a vocabulary."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import xllamacpp

from vlmexport.model.family import MetaValue

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_PARAMS_BYTES = 80  # sizeof(llama_model_params) of the pinned wheel
_VOCAB_ONLY = 72  # offsetof(llama_model_params, vocab_only)


class LlamaVocabulary:
    """`metadata` as llama.cpp reads it; a context manager."""

    def __init__(self, metadata: dict[str, MetaValue], folder: Path, arch: str = "llama") -> None:
        path = write_vocabulary(metadata, folder / "vocab.gguf", arch)
        params = _library().llama_model_default_params()
        params.vocab_only = True
        self._model = _library().llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp refuses the vocabulary: {'; '.join(_LINES[-4:])}")
        self._vocab = _library().llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaVocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        _library().llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool = True, automatic: bool = False) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 16))()
        count = _library().llama_tokenize(self._vocab, data, len(data), room, len(room), automatic, special)
        assert count >= 0
        return list(room[:count])

    def piece(self, token: int) -> str:
        room = ctypes.create_string_buffer(512)
        count = _library().llama_token_to_piece(self._vocab, token, room, len(room), 0, True)
        return room.raw[:count].decode(errors="replace")

    def is_end(self, token: int) -> bool:
        return bool(_library().llama_vocab_is_eog(self._vocab, token))


def write_vocabulary(metadata: dict[str, MetaValue], path: Path, arch: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                raise TypeError(f"{key}: {type(value)}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("before", ctypes.c_byte * _VOCAB_ONLY),
        ("vocab_only", ctypes.c_bool),
        ("after", ctypes.c_byte * (_PARAMS_BYTES - _VOCAB_ONLY - 1)),
    ]


_LINES: list[str] = []


@_LOG
def _keep(_level: int, line: bytes, _data: Any) -> None:
    _LINES.append(line.decode(errors="replace").strip())


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    pointer, integer, boolean = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    library.llama_model_default_params.restype = _ModelParams
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
    library.llama_model_load_from_file.restype = pointer
    library.llama_model_get_vocab.argtypes = [pointer]
    library.llama_model_get_vocab.restype = pointer
    library.llama_model_free.argtypes = [pointer]
    library.llama_tokenize.argtypes = [pointer, ctypes.c_char_p, integer, pointer, integer, boolean, boolean]
    library.llama_token_to_piece.argtypes = [pointer, integer, ctypes.c_char_p, integer, integer, boolean]
    library.llama_vocab_is_eog.argtypes = [pointer, integer]
    library.llama_vocab_is_eog.restype = boolean
    library.llama_log_set(_keep, None)
    return library
