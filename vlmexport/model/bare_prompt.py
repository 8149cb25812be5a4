"""Prompts of models without a chat template: who writes the places of the pictures, the user or the processor.

Most processors want an image token in the text for each picture. Some put it there themselves, and take no text that
has one already: found by giving the processor a small picture both ways.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError
from vlmexport.model.calling_transformers import quiet_transformers

if TYPE_CHECKING:
    from PIL.Image import Image

_WORDS = "a"
_SIDE = 32
# What a processor raises when it cannot take a picture and a text as they are.
_PROCESSOR_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, StopIteration, AssertionError,
    ArithmeticError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class BarePrompt:
    """How a processor takes pictures in a text of no template.

    `token` is the image token. `places_itself`: the processor writes the places of pictures, the text must not.
    `several`: one prompt may have more than one picture.
    """

    token: str
    places_itself: bool = False
    several: bool = True

    def text(self, images: int, words: str) -> str:
        """`words` with the places of so many pictures before them, as the processor wants it.

        Raises `BadInputError` for more pictures than a prompt of the model has.
        """
        if images > 1 and not self.several:
            raise BadInputError(f"the model's processor takes one picture with a prompt, not {images}")
        return words if self.places_itself else self.token * images + words


def bare_prompt(processor: Any, token: str | None = None) -> BarePrompt | None:
    """How `processor` takes pictures without a chat template; None where it has no image token and no `token` is given.

    The processor is called on small pictures, at most three times.
    """
    own = getattr(processor, "image_token", None)
    if own is None and token is None:
        return None
    name = str(token if own is None else own)
    alone = _places(processor, name, _WORDS, 1)
    if not alone or 0 < _places(processor, name, name + _WORDS, 1) <= alone:
        return BarePrompt(name)
    return BarePrompt(name, places_itself=True, several=_places(processor, name, _WORDS, 2) > alone)


def _places(processor: Any, token: str, text: str, images: int) -> int:
    """How many image tokens the processor makes of `text` and so many pictures; 0 where it refuses them."""
    with contextlib.suppress(*_PROCESSOR_ERRORS), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        made = processor(text=[text], images=[[_picture() for _ in range(images)]], return_tensors="pt")
        return int((made["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)).sum())
    return 0


def _picture() -> Image:
    from PIL import Image

    return Image.new("RGB", (_SIDE, _SIDE), (90, 120, 60))
