"""One llama.cpp context: its key-value cache, and the batches that fill it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int8, c_int32
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.types import ggml_type
from vlmexport.runtime.llamacpp.bindings import FLASH_AUTO, FLASH_OFF, LOG, llama
from vlmexport.runtime.llamacpp.chunks import ImageChunk
from vlmexport.runtime.protocol import PartOutputError

MICRO_BATCH = 512  # llama.cpp's own default
_NO_ROOM = 1
# Rows of logits that one batch may give: the buffer for them is as many times the vocabulary.
_MOST_OUTPUTS = 64


class LlamaDecoder:
    """A running decoder; `position` is that of the next token, `used` counts the rows in the cache.

    `model`: llama.cpp's model; `context`: rows of the cache; `kv_type`: ggml type of the cache; `micro_batch`: tokens
    that are computed at once.
    """

    def __init__(
        self, model: Any, context: int, *, threads: int, kv_type: str, flash_attention: bool, micro_batch: int
    ) -> None:
        library = llama()
        params = library.llama_context_default_params()
        params.n_ctx = context
        params.n_ubatch = micro_batch
        params.n_batch = max(params.n_batch, micro_batch)
        params.n_outputs_max = _MOST_OUTPUTS
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = ggml_type(kv_type).id
        params.flash_attn_type = FLASH_AUTO if flash_attention else FLASH_OFF
        LOG.clear()
        self._pointer = library.llama_init_from_model(model, params)
        if not self._pointer:
            raise BadInputError(f"llama.cpp makes no context of {context} tokens: {LOG.message()}")
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self._batch = int(library.llama_n_batch(self._pointer))
        self.micro_batch = int(library.llama_n_ubatch(self._pointer))
        self.context = int(library.llama_n_ctx(self._pointer))
        self.position = 0
        self.used = 0

    def close(self) -> None:
        """Free the context; call once."""
        llama().llama_free(self._pointer)
        self._pointer = None

    def set_lora(self, adapter: Any) -> None:
        """Apply a loaded adapter at full strength."""
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (c_float * 1)(1.0)
        LOG.clear()
        if llama().llama_set_adapters_lora(self._pointer, adapters, 1, scales):
            raise BadInputError(f"llama.cpp does not apply the LoRA adapter: {LOG.message()}")

    def clear(self) -> None:
        """Forget everything that was decoded."""
        library = llama()
        library.llama_memory_clear(library.llama_get_memory(self._pointer), True)
        self.position = self.used = 0

    def text(self, ids: list[int], outputs: int) -> NDArray[np.float32]:
        """Decode text tokens; the logits ``[outputs, vocab]`` behind the last `outputs` of them."""
        rows: list[NDArray[np.float32]] = [np.empty((0, self._vocab_size), np.float32)]
        first = len(ids) - outputs
        start = 0
        while start < len(ids):
            end = min(len(ids), start + self._batch, max(first, start) + _MOST_OUTPUTS)
            rows.append(self._batch_of(ids[start:end], max(0, end - max(first, start))))
            start = end
        return np.concatenate(rows)

    def image(self, vision: Any, chunk: ImageChunk, embeddings: NDArray[np.float32]) -> None:
        """Decode one encoded picture, at the positions and with the mask that the mtmd context `vision` asks for.

        Where the model looks at a picture in both directions, the picture must fit into one micro batch: llama.cpp
        ends the process otherwise.
        """
        values = np.ascontiguousarray(embeddings, np.float32)
        after = c_int32(self.position)
        LOG.clear()
        code = llama().mtmd_helper_decode_image_chunk(
            vision, self._pointer, chunk.pointer, values.ctypes.data_as(POINTER(c_float)),
            self.position, 0, self._batch, ctypes.byref(after), None, None,
        )  # fmt: skip
        self._check(code, chunk.tokens)
        self.position, self.used = after.value, self.used + chunk.tokens

    def _batch_of(self, ids: list[int], outputs: int) -> NDArray[np.float32]:
        library = llama()
        count = len(ids)
        flags = np.zeros(count, np.int8)
        flags[count - outputs :] = 1
        positions = np.arange(self.position, self.position + count, dtype=np.int32)
        tokens = np.array(ids, np.int32)
        batch = library.llama_decode.argtypes[1](
            n_tokens=count,
            token=tokens.ctypes.data_as(POINTER(c_int32)),
            pos=positions.ctypes.data_as(POINTER(c_int32)),
            logits=flags.ctypes.data_as(POINTER(c_int8)),
        )
        LOG.clear()
        self._check(library.llama_decode(self._pointer, batch), count)
        self.position, self.used = self.position + count, self.used + count
        if not outputs:
            return np.empty((0, self._vocab_size), np.float32)
        logits = np.ctypeslib.as_array(library.llama_get_logits(self._pointer), (outputs, self._vocab_size)).copy()
        if not np.isfinite(logits).all():
            raise PartOutputError("decoder", "llama.cpp gives logits that are not finite")
        return logits

    def _check(self, code: int, count: int) -> None:
        if code == _NO_ROOM:
            raise BadInputError(
                f"{self.used + count} tokens do not fit into the context of {self.context}; give a larger one"
            )
        if code:
            raise PartOutputError("decoder", f"llama.cpp's decode failed with code {code}: {LOG.message()}")
