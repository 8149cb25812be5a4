"""From a question and picture files to model inputs, by the model's own processor and chat template."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vlmexport.errors import BadInputError
from vlmexport.model.bare_prompt import BarePrompt, bare_prompt
from vlmexport.runtime.protocol import ModelInputs

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
# What Pillow's readers let through when a file is damaged.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
_TEXT_OUTPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


class PromptBuilder:
    """Builds prompts with the processor in `folder` (an export or a checkpoint folder); loads no model."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoProcessor

        load: Any = AutoProcessor.from_pretrained
        try:
            self.processor: Any = load(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if "torchvision" in reason.lower():
                reason = f"{reason.partition('. ')[0]}; pip install torchvision"
            raise BadInputError(f"{folder}: the processor does not load: {reason}") from error
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)

    def build(self, images: Sequence[Path | Image], prompt: str) -> ModelInputs:
        """Inputs of one user turn: the images, then the text.

        A model without a chat template gets its image token for each picture (where its processor does not write it),
        and the text as it is. Raises `BadInputError` for words or pictures that its processor refuses.
        """
        pictures = [load_image(i) if isinstance(i, Path) else i for i in images]
        if (bare := self.bare) is not None:
            return self._refusing(bare.text(len(pictures), prompt), pictures)
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
        text = self.render([{"role": "user", "content": content}])
        return self.encode(text, pictures)

    @cached_property
    def bare(self) -> BarePrompt | None:
        """How pictures stand in a prompt; None for a model that has a chat template, or no image token."""
        return None if getattr(self.processor, "chat_template", None) else bare_prompt(self.processor)

    def _refusing(self, text: str, pictures: Sequence[Image]) -> ModelInputs:
        """`encode`, its processor's refusal as one line."""
        try:
            return self.encode(text, pictures)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise BadInputError(f"the model's processor refuses this prompt: {reason}") from error

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of a chat, ready for the assistant's turn."""
        if not getattr(self.processor, "chat_template", None):
            raise BadInputError("the model has no chat template, so a question cannot be put into its words")
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def encode(self, text: str, pictures: Sequence[Image], more: Mapping[str, Any] | None = None) -> ModelInputs:
        """Token ids and pixel inputs of a rendered prompt whose image placeholders stand for `pictures`.

        `more` are further arguments of the processor (a video).
        """
        images = {**({"images": [list(pictures)]} if pictures else {}), **(more or {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            out = self.processor(text=[text], return_tensors="pt", **special_tokens(self.tokenizer, text), **images)
        arrays = {name: np.asarray(value) for name, value in out.items() if hasattr(value, "shape")}
        pixels = {name: value for name, value in arrays.items() if name not in _TEXT_OUTPUTS}
        return ModelInputs(arrays["input_ids"].astype(np.int64), pixels)


def special_tokens(tokenizer: Any, text: str) -> dict[str, bool]:
    """Arguments for `tokenizer`: a template that wrote the begin token must not get a second (as transformers does)."""
    bos = getattr(tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def load_image(path: Path) -> Image:
    """Open a picture as upright RGB.

    Raises `BadInputError` naming the file when it is missing, not a picture, damaged, or larger than `MAX_PIXELS`.
    """
    return read_image(path, str(path))


def read_image(source: Path | BinaryIO, name: str, formats: tuple[str, ...] | None = None) -> Image:
    """Decode a picture file (or its bytes) as upright RGB; `name` stands for it in errors, which are `load_image`'s.

    `formats`: the only ones to take (None: all that Pillow reads).
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise BadInputError(f"{name} has {file.width}x{file.height} pixels; the limit is {MAX_PIXELS}")
                return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError as error:
        raise BadInputError(f"no such image: {name}") from error
    except Image.DecompressionBombError as error:
        raise BadInputError(f"{name} has too many pixels; the limit is {MAX_PIXELS}") from error
    except DAMAGED as error:
        raise BadInputError(f"{name} is not a readable image: {error}") from error
