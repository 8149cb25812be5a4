"""`LlamaCppRunner`: a text GGUF and its vision half, run by the real llama.cpp on the CPU."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.cpu import available_cores
from vlmexport.errors import ArtifactError, BadInputError
from vlmexport.runtime.generate import Timings
from vlmexport.runtime.llamacpp.bindings import FLASH_AUTO, FLASH_OFF, LOG, MARKER, llama
from vlmexport.runtime.llamacpp.chunks import ImageChunk, LlamaPrompt, TextChunk, cut, encode, utf8
from vlmexport.runtime.llamacpp.decoder import MICRO_BATCH, LlamaDecoder
from vlmexport.runtime.sampling import Sampling, choose

if TYPE_CHECKING:
    from PIL.Image import Image

_MAGIC = b"GGUF"


class LlamaCppRunner:
    """One loaded model; a context manager. Prompts made by `prompt` must not outlive it.

    `text`: the GGUF of the text model; `mmproj`: that of its vision half (None: text only); `lora`: an adapter GGUF.
    `threads` 0 = all cores that this process may use (at most ``OMP_NUM_THREADS``). `context`: rows of the key-value
    cache; it is made at the first decoding. `kv_type`: ggml type of the cache. `exact`: an F32 cache and no flash
    attention, for comparison with PyTorch; otherwise what llama.cpp's own tools do. `load_ms`: how long loading took.

    Raises `BadInputError` when a file is missing, `ArtifactError` when llama.cpp does not load one (with its own
    message: halves that do not fit together, say), `NotPossibleHereError` without the pinned wheel.
    """

    def __init__(
        self,
        text: Path,
        mmproj: Path | None,
        *,
        threads: int = 0,
        context: int = 4096,
        lora: Path | None = None,
        kv_type: str = "f16",
        flash_attention: bool = True,
        exact: bool = False,
    ) -> None:
        start = time.perf_counter()
        self._library = llama()
        self._threads = threads or _usable_cores()
        self._kv_type = "f32" if exact else kv_type
        self._flash = flash_attention and not exact
        self._context = context
        self._micro_batch = MICRO_BATCH
        self._model = self._vision = self._adapter = None
        self._decoder: LlamaDecoder | None = None
        try:
            self._model = self._load_text(text)
            self._adapter = self._load_lora(lora) if lora is not None else None
            self._vision = self._load_vision(mmproj) if mmproj is not None else None
        except BaseException:
            self.close()
            raise
        self.marker = MARKER
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))
        self.embedding_width = int(self._library.llama_model_n_embd_inp(self._model))
        self.load_ms = 1000 * (time.perf_counter() - start)

    def __enter__(self) -> LlamaCppRunner:
        """The runner itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the model."""
        self.close()

    def close(self) -> None:
        """Free the model and its cache; may be called again."""
        self._drop_decoder()
        if self._vision:
            self._library.mtmd_free(self._vision)
        if self._model:
            self._library.llama_model_free(self._model)  # its adapters with it
        self._vision = self._model = self._adapter = None

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer for llama.cpp (end of text, of turn and the like)."""
        return tuple(i for i in range(self.vocab_size) if self._library.llama_vocab_is_eog(self._vocab, i))

    @property
    def chat_template(self) -> str | None:
        """The template in the text GGUF."""
        found = self._library.llama_model_chat_template(self._model, None)
        return None if found is None else found.decode()

    def metadata(self, key: str) -> str | None:
        """A scalar value of the text GGUF's metadata as llama.cpp prints it; None when the key is not there."""
        buffer = ctypes.create_string_buffer(4096)
        length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def reserve(self, tokens: int) -> None:
        """Make the context hold at least `tokens`; what was decoded so far is forgotten when it must grow."""
        if tokens <= self._context:
            return
        self._context = tokens
        self._drop_decoder()

    def prepare(self) -> None:
        """Make the context now, and not at the first decoding."""
        self._decoder = self._decoder or self._make_decoder()

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, special tokens in it parsed.

        `special`: begin and end tokens are added where the metadata asks for them; a text that writes the begin token
        itself gets no second one.
        """
        encoded = utf8(text)
        room = len(encoded) + 2
        ids = (ctypes.c_int32 * room)()
        add = special and self._adds_special(text)
        count = self._library.llama_tokenize(self._vocab, encoded, len(encoded), ids, room, add, True)
        if count < 0:
            raise BadInputError(f"llama.cpp does not tokenize {text[:40]!r}: it needs room for {-count} tokens")
        return list(ids[:count])

    def prompt(self, text: str, images: Sequence[Image] = ()) -> LlamaPrompt:
        """Tokenize a rendered prompt in which `marker` stands where each of `images` goes.

        Raises `BadInputError` when there are not as many markers as images, or when there is no vision half for them.
        """
        if (markers := text.count(self.marker)) != len(images):
            raise BadInputError(f"the prompt has {markers} places for pictures and {len(images)} pictures were given")
        if self._vision is None and images:
            raise BadInputError("there is no vision half (mmproj) for the pictures of the prompt")
        if self._vision is None:
            return LlamaPrompt([TextChunk(tuple(self.tokenize(text)))])
        return cut(self._vision, text, images, self._adds_special(text))

    def image_embeddings(self, prompt: LlamaPrompt) -> NDArray[np.float32]:
        """Embeddings ``[image tokens, width]`` of all pictures in order; encoded once per prompt.

        `width` is what the decoder takes: the hidden size, and as much again for every deepstack level.
        """
        return np.concatenate([np.empty((0, self.embedding_width), np.float32), *self._encoded(prompt)])

    def forced(self, prompt: LlamaPrompt, answer: Sequence[int]) -> NDArray[np.float32]:
        """Raw logits ``[len(answer), vocab]`` that predict each token of `answer` behind the tokens before it."""
        if not len(answer):
            raise BadInputError("there is no answer token to predict")
        decoder = self._prefilled(prompt, len(answer))
        return decoder.text([*prompt.tail, *map(int, answer[:-1])], len(answer))

    def prompt_logits(self, prompt: LlamaPrompt) -> NDArray[np.float32]:
        """Raw logits ``[tail, vocab]`` behind every text token after the last picture (all tokens without a picture).

        Row i predicts what follows ``prompt.tail[i]``; the last row predicts the first answer token.
        """
        decoder = self._prefilled(prompt, 0)
        return decoder.text(list(prompt.tail), len(prompt.tail))

    def greedy(self, prompt: LlamaPrompt, max_new_tokens: int) -> list[int]:
        """The likeliest answer, at most `max_new_tokens` long; its end token is included."""
        return list(self._steps(prompt, max_new_tokens, lambda row: int(row.argmax()), self._ends, Timings()))

    def generate(
        self,
        prompt: LlamaPrompt,
        sampling: Sampling,
        timings: Timings | None = None,
        *,
        end_tokens: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yield the answer's tokens as they come, without the end token; fills `timings` as it goes.

        `end_tokens` replaces llama.cpp's own; empty means that the answer has ``sampling.max_new_tokens`` tokens.
        """
        generator = sampling.generator()
        ends = self._ends if end_tokens is None else end_tokens.__contains__
        taken = self._steps(
            prompt, sampling.max_new_tokens, lambda row: choose(row, sampling, generator), ends, timings or Timings()
        )
        for token in taken:
            if ends(token):
                return
            yield token

    def _steps(
        self,
        prompt: LlamaPrompt,
        limit: int,
        pick: Callable[[NDArray[np.float32]], int],
        ends: Callable[[int], bool],
        timings: Timings,
    ) -> Iterator[int]:
        start = time.perf_counter()
        self._encoded(prompt)
        encoded = time.perf_counter()
        decoder = self._prefilled(prompt, limit)
        logits = decoder.text(list(prompt.tail), 1)[-1]
        timings.image_ms = 1000 * (encoded - start)
        timings.prefill_ms = 1000 * (time.perf_counter() - encoded)
        for step in range(limit):
            token = pick(logits)
            yield token
            if ends(token) or step + 1 == limit:
                return
            start = time.perf_counter()
            logits = decoder.text([token], 1)[-1]
            timings.decode_ms.append(1000 * (time.perf_counter() - start))

    @property
    def _vocab(self) -> Any:
        if not self._model:
            raise BadInputError("the runner is closed")
        return self._library.llama_model_get_vocab(self._model)

    def _ends(self, token: int) -> bool:
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def _encoded(self, prompt: LlamaPrompt) -> tuple[NDArray[np.float32], ...]:
        if prompt.embeddings is None:
            prompt.embeddings = tuple(encode(self._vision, chunk, self.embedding_width) for chunk in prompt.images)
        return prompt.embeddings

    def _prefilled(self, prompt: LlamaPrompt, more: int) -> LlamaDecoder:
        """The decoder with all of the prompt but its tail in an otherwise empty cache, with room for `more` tokens."""
        if not prompt.tail:
            raise BadInputError("the prompt must end with text, for the answer continues behind a text token")
        self._fit(prompt)
        self.prepare()
        decoder = self._decoder
        assert decoder is not None
        if (needed := len(prompt.ids) + more) > decoder.context:
            raise BadInputError(
                f"the prompt of {len(prompt.ids)} tokens and {more} answer tokens need {needed}, but the context has "
                f"{decoder.context}; give context={needed}"
            )
        embeddings = iter(self._encoded(prompt))
        decoder.clear()
        for chunk in prompt.chunks[:-1]:
            if isinstance(chunk, ImageChunk):
                decoder.image(self._vision, chunk, next(embeddings))
            else:
                decoder.text(list(chunk.ids), 0)
        return decoder

    def _fit(self, prompt: LlamaPrompt) -> None:
        """Make the micro batch hold each picture whole where the model looks at pictures in both directions."""
        largest = max((chunk.tokens for chunk in prompt.images), default=0)
        if largest > self._micro_batch and self._library.mtmd_decode_use_non_causal(self._vision, None):
            self._micro_batch = largest
            self._drop_decoder()

    def _make_decoder(self) -> LlamaDecoder:
        decoder = LlamaDecoder(
            self._model,
            self._context,
            threads=self._threads,
            kv_type=self._kv_type,
            flash_attention=self._flash,
            micro_batch=self._micro_batch,
        )
        if self._adapter:
            decoder.set_lora(self._adapter)
        return decoder

    def _drop_decoder(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None

    def _adds_special(self, text: str) -> bool:
        begin = self._library.llama_vocab_bos(self._vocab)
        written = self._library.llama_vocab_get_text(self._vocab, begin).decode() if begin >= 0 else ""
        return not (written and text.startswith(written))

    def _load_text(self, path: Path) -> Any:
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        return _loaded(path, lambda name: self._library.llama_model_load_from_file(name, params))

    def _load_lora(self, path: Path) -> Any:
        return _loaded(path, lambda name: self._library.llama_adapter_lora_init(self._model, name))

    def _load_vision(self, path: Path) -> Any:
        params = self._library.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = self._threads
        params.flash_attn_type = FLASH_AUTO if self._flash else FLASH_OFF
        loaded = _loaded(path, lambda name: self._library.mtmd_init_from_file(name, self._model, params))
        if not self._library.mtmd_support_vision(loaded):
            self._library.mtmd_free(loaded)
            raise BadInputError(f"{path} has no vision encoder")
        return loaded


def _loaded(path: Path, load: Callable[[bytes], Any]) -> Any:
    """What `load` makes of a GGUF file; raises `BadInputError` or `ArtifactError` with the reason."""
    if not path.is_file():
        raise BadInputError(f"no such file: {path}")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ArtifactError(f"{path} is not a GGUF file")
    LOG.clear()
    loaded = load(os.fsencode(path))
    if not loaded:
        raise ArtifactError(f"llama.cpp does not load {path}: {LOG.message()}")
    return loaded


def _usable_cores() -> int:
    """Cores that this process may use, at most ``OMP_NUM_THREADS``."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    cores = available_cores()
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) else cores
