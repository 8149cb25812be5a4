"""A prompt as llama.cpp cuts it: runs of token ids, and pictures that take a number of positions each."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.runtime.llamacpp.bindings import IMAGE_CHUNK, LOG, TEXT_CHUNK, llama
from vlmexport.runtime.llamacpp.structs import InputText
from vlmexport.runtime.protocol import PartOutputError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_ID = -1


@dataclass(frozen=True)
class TextChunk:
    """Consecutive text tokens; each takes one position."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageChunk:
    """One picture, or one tile of a picture.

    `pointer` is llama.cpp's own chunk, alive as long as its prompt. `tokens` are the rows it takes in the decoder,
    `positions` how far it moves the position of the text behind it (less than `tokens` under M-RoPE).
    """

    pointer: int
    tokens: int
    positions: int


Chunk: TypeAlias = TextChunk | ImageChunk


class LlamaPrompt:
    """One tokenized prompt with its pictures; made by ``LlamaCppRunner.prompt``, freed with the last reference.

    `ids`: int64 ``[tokens]``, `IMAGE_ID` at image positions. `image_tokens`: how many of those there are.
    """

    def __init__(self, chunks: Sequence[Chunk], owner: Any = None) -> None:
        """`owner`: llama.cpp's list of the chunks, which is freed with this object."""
        self.chunks = tuple(chunks)
        self.ids: NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *map(_ids, self.chunks)])
        self.image_tokens = int((self.ids == IMAGE_ID).sum())
        # One array [tokens, width] per image chunk, once it is encoded.
        self.embeddings: tuple[NDArray[np.float32], ...] | None = None
        if owner is not None:
            weakref.finalize(self, llama().mtmd_input_chunks_free, owner)

    @property
    def images(self) -> tuple[ImageChunk, ...]:
        """The image chunks in order."""
        return tuple(c for c in self.chunks if isinstance(c, ImageChunk))

    @property
    def tail(self) -> tuple[int, ...]:
        """The text tokens behind the last picture."""
        last = self.chunks[-1] if self.chunks else None
        return last.ids if isinstance(last, TextChunk) else ()


def _ids(chunk: Chunk) -> NDArray[np.int64]:
    if isinstance(chunk, ImageChunk):
        return np.full(chunk.tokens, IMAGE_ID, np.int64)
    return np.array(chunk.ids, np.int64)


def cut(vision: Any, text: str, images: Sequence[Image], add_special: bool) -> LlamaPrompt:
    """Tokenize `text`, in which `images` stand at the markers, with the mtmd context `vision`.

    `add_special`: let the vocabulary's metadata decide about a begin and an end token.
    Raises `BadInputError` with llama.cpp's message (another number of markers than of images, say).
    """
    library = llama()
    owner = library.mtmd_input_chunks_init()
    bitmaps = [_bitmap(image) for image in images]
    try:
        _tokenize(vision, owner, utf8(text), bitmaps, add_special)
        count = library.mtmd_input_chunks_size(owner)
        chunks = [_chunk(library.mtmd_input_chunks_get(owner, i)) for i in range(count)]
    except BaseException:
        library.mtmd_input_chunks_free(owner)
        raise
    finally:
        for bitmap in bitmaps:
            library.mtmd_bitmap_free(bitmap)
    return LlamaPrompt(chunks, owner)


def utf8(text: str) -> bytes:
    """The bytes that llama.cpp takes; a command line may hold what is no Unicode text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from error


def _tokenize(vision: Any, owner: Any, text: bytes, bitmaps: Sequence[Any], add_special: bool) -> None:
    request = InputText(text, len(text), add_special, True)
    pointers = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
    LOG.clear()
    if llama().mtmd_tokenize(vision, owner, ctypes.byref(request), pointers, len(bitmaps)):
        raise BadInputError(f"llama.cpp does not take the prompt: {LOG.message()}")


def _bitmap(image: Image) -> Any:
    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"), np.uint8))
    height, width, _ = pixels.shape
    return llama().mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))


def _chunk(pointer: int) -> Chunk:
    library = llama()
    kind = library.mtmd_input_chunk_get_type(pointer)
    if kind == IMAGE_CHUNK:
        tokens = library.mtmd_input_chunk_get_n_tokens(pointer)
        return ImageChunk(pointer, tokens, library.mtmd_input_chunk_get_n_pos(pointer))
    if kind != TEXT_CHUNK:
        raise BadInputError(
            f"llama.cpp made a chunk of type {kind} of the prompt; only text and pictures are supported"
        )
    count = ctypes.c_size_t()
    ids = library.mtmd_input_chunk_get_tokens_text(pointer, ctypes.byref(count))
    return TextChunk(tuple(ids[: count.value]))


def encode(vision: Any, chunk: ImageChunk, width: int) -> NDArray[np.float32]:
    """Embeddings ``[tokens, width]`` of one image chunk; raises `PartOutputError` when llama.cpp fails."""
    library = llama()
    LOG.clear()
    if library.mtmd_encode_chunk(vision, chunk.pointer):
        raise PartOutputError("vision_encoder", f"llama.cpp does not encode the picture: {LOG.message()}")
    values = np.ctypeslib.as_array(library.mtmd_get_output_embd(vision), (chunk.tokens, width)).copy()
    if not np.isfinite(values).all():
        raise PartOutputError("vision_encoder", "llama.cpp gives embeddings that are not finite")
    return values
