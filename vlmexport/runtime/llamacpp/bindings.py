"""llama.cpp's C interface from the pinned wheel, by ctypes: prototypes, layout check and log.

The wheel exports these symbols without promising them, so the version is pinned and the layout is checked at load.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from typing import Any

from vlmexport.errors import NotPossibleHereError
from vlmexport.quantize.ggml.library import ggml_library, require_library
from vlmexport.runtime.llamacpp.structs import Batch, ContextParams, InputText, ModelParams, MtmdParams

FLASH_AUTO = -1
FLASH_OFF = 0
MARKER = "<__media__>"
TEXT_CHUNK = 0
IMAGE_CHUNK = 1
_ERROR = 4
_CONTINUED = 5
_LONGEST_MESSAGE = 400

# name: (result, arguments); pointers to llama.cpp's own types are opaque.
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_ubatch": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_embd_inp": (c_int32, (c_void_p,)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_get_text": (c_char_p, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (c_int32, (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float))),
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "mtmd_helper_log_set": (None, (c_void_p, c_void_p)),
    "mtmd_context_params_default": (MtmdParams, ()),
    "mtmd_init_from_file": (c_void_p, (c_char_p, c_void_p, MtmdParams)),
    "mtmd_free": (None, (c_void_p,)),
    "mtmd_support_vision": (c_bool, (c_void_p,)),
    "mtmd_decode_use_non_causal": (c_bool, (c_void_p, c_void_p)),
    "mtmd_bitmap_init": (c_void_p, (c_uint32, c_uint32, POINTER(c_uint8))),
    "mtmd_bitmap_free": (None, (c_void_p,)),
    "mtmd_input_chunks_init": (c_void_p, ()),
    "mtmd_input_chunks_size": (c_size_t, (c_void_p,)),
    "mtmd_input_chunks_get": (c_void_p, (c_void_p, c_size_t)),
    "mtmd_input_chunks_free": (None, (c_void_p,)),
    "mtmd_input_chunk_get_type": (c_int, (c_void_p,)),
    "mtmd_input_chunk_get_tokens_text": (POINTER(c_int32), (c_void_p, POINTER(c_size_t))),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, (c_void_p,)),
    "mtmd_input_chunk_get_n_pos": (c_int32, (c_void_p,)),
    "mtmd_tokenize": (c_int32, (c_void_p, c_void_p, POINTER(InputText), POINTER(c_void_p), c_size_t)),
    "mtmd_encode_chunk": (c_int32, (c_void_p, c_void_p)),
    "mtmd_get_output_embd": (POINTER(c_float), (c_void_p,)),
    "mtmd_helper_decode_image_chunk": (
        c_int32,
        (
            c_void_p, c_void_p, c_void_p, POINTER(c_float), c_int32, c_int32, c_int32, POINTER(c_int32),
            c_void_p, c_void_p,
        ),
    ),
}  # fmt: skip

# What the library must say of itself for the structs to be laid out as ours.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_default_params": {
        "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "kv_overrides": None,
        "vocab_only": False, "use_extra_bufts": True, "load_mtp": False,
    },
    "llama_context_default_params": {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_outputs_max_per_seq": 1, "flash_attn_type": -1,
        "yarn_ext_factor": -1.0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "moe_cache_size": 0,
        "offload_kqv": True, "no_perf": True, "swa_full": True, "kv_unified": False, "ctx_other": None,
    },
    "mtmd_context_params_default": {
        "use_gpu": True, "print_timings": True, "n_threads": 4, "media_marker": MARKER.encode(), "flash_attn_type": -1,
        "warmup": True, "image_min_tokens": -1, "image_max_tokens": -1, "batch_max_tokens": 1024,
    },
}  # fmt: skip

_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class Log:
    """The error lines that llama.cpp wrote since `clear`; everything it says at lower levels is dropped."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=50)
        self._level = 0
        self.callback = _LogCallback(self._add)

    def clear(self) -> None:
        """Forget the lines so far."""
        self._lines.clear()

    def message(self, without: str = "it gave no reason") -> str:
        """The lines in one, without the names of C++ functions and each once; `without` when there is none."""
        said: list[str] = []
        for line in "".join(self._lines).splitlines():
            text = re.sub(r"^\s*(\w+: )+(error: |error loading model: )?", "", line).strip()
            if text and text not in said:
                said.append(text)
        return "; ".join(said)[:_LONGEST_MESSAGE] or without

    def _add(self, level: int, text: bytes, _data: object) -> None:
        self._level = self._level if level == _CONTINUED else level
        if self._level == _ERROR:
            self._lines.append(text.decode("utf-8", "replace"))


LOG = Log()


def llama() -> Any:
    """The library with all prototypes set, its log silenced (errors go to `LOG`), ready for use.

    The log is set at every call: whoever else uses the library in this process (`xllamacpp.Server`) sets its own.
    Raises `NotPossibleHereError` where the pinned wheel is missing or its structs are not the ones we know.
    """
    library = _library()
    address = ctypes.cast(LOG.callback, c_void_p)
    library.llama_log_set(address, None)
    library.mtmd_helper_log_set(address, None)
    return library


@cache
def _library() -> Any:
    ggml_library()  # which refuses other wheels and other bytes; its own handle keeps its own prototypes
    library = ctypes.CDLL(str(require_library()))
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name, None)
        if function is None:
            raise _foreign(f"it has no {name}")
        function.restype, function.argtypes = result, list(arguments)
    check_defaults(library)
    library.llama_backend_init()
    return library


def check_defaults(library: Any) -> None:
    """Refuse a library whose default parameters, read through our structs, are not those of the known build."""
    for name, expected in _DEFAULTS.items():
        given = getattr(library, name)()
        for field, value in expected.items():
            if getattr(given, field) != value:
                raise _foreign(f"{name}().{field} is {getattr(given, field)!r} instead of {value!r}")


def _foreign(what: str) -> NotPossibleHereError:
    return NotPossibleHereError(
        f"{require_library()} is not the llama.cpp that vlmexport knows ({what}); pip install 'vlmexport[gguf]'"
    )
