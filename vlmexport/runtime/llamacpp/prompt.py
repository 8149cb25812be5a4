"""The words of a prompt for llama.cpp: the model's own chat template, with llama.cpp's marker for every picture.

llama.cpp writes the tokens around a picture itself (``<|vision_start|>``, ``<start_of_image>``, rows and columns of
tiles), so the marker takes the place of everything that the template writes for one, not only of the image token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.runtime.prompt import PromptBuilder

_PROBE = "probe"


class TextBuilder(PromptBuilder):
    """A `PromptBuilder` of the tokenizer alone, for a folder whose image processor cannot load here.

    It renders; it does not prepare pixels, which llama.cpp does itself.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        load: Any = AutoTokenizer.from_pretrained
        try:
            self.processor = self.tokenizer = load(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise BadInputError(f"{folder}: the tokenizer does not load: {str(error).splitlines()[0]}") from error
        template = folder / "chat_template.jinja"
        if not getattr(self.tokenizer, "chat_template", None) and template.is_file():
            self.tokenizer.chat_template = template.read_text(encoding="utf-8")


def prompt_builder(folder: Path, *, trust_remote_code: bool = False) -> PromptBuilder:
    """The processor in `folder`, or its tokenizer where the image processor cannot load (it may want torchvision)."""
    try:
        return PromptBuilder(folder, trust_remote_code=trust_remote_code)
    except (BadInputError, ImportError):
        return TextBuilder(folder, trust_remote_code=trust_remote_code)


def marked_prompt(builder: PromptBuilder, messages: str | list[dict[str, Any]], images: int, marker: str) -> str:
    """Render a chat, or one question about `images` pictures, with `marker` where each picture goes.

    In `messages` pictures are parts ``{"type": "image"}``, `images` of them in all.
    Raises `BadInputError` when the text of the chat holds the marker or the model's own placeholder, and
    `UnsupportedModelError` when the chat template writes nothing for a picture.
    """
    chat = _turn(messages, images) if isinstance(messages, str) else messages
    text = builder.render(chat)
    if marker in text:
        raise BadInputError(f"the prompt must not contain {marker!r}, which stands for a picture in llama.cpp")
    text = spaced_start(builder.tokenizer, text)
    if not images:
        return text
    place = image_place(builder)
    if (found := text.count(place)) != images:
        raise BadInputError(
            f"the chat template writes {found} places {place!r} for {images} pictures; take it out of the question"
        )
    before, after = written_around(builder.processor)
    return text.replace(place, before + marker + after)


def spaced_start(tokenizer: Any, text: str) -> str:
    """`text` with the space in front that a ``Metaspace`` of the scheme "first" gives the very first word.

    llama.cpp puts a space after every special token or nowhere, so it must stand in the text. It changes no ids of
    `tokenizer`'s own: there is none before a special token or another space.
    """
    before_words = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if getattr(before_words, "prepend_scheme", "") != "first":
        return text
    return text if not text or text.startswith((" ", *tokenizer.get_added_vocab())) else f" {text}"


def image_place(builder: PromptBuilder) -> str:
    """What the chat template writes for one picture: special tokens such as ``<image>``, found by rendering."""
    bare, full = builder.render(_turn(_PROBE, 0)), builder.render(_turn(_PROBE, 1))
    specials = _special_tokens(builder.tokenizer)
    if specials:
        token = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        added = "".join(_difference(re.split(f"({token})", full), re.split(f"({token})", bare)))
        if runs := re.findall(f"(?:{token})+", added):
            return str(max(runs, key=len))
    written = "".join(_difference(list(full), list(bare))).strip()
    if not written:
        raise UnsupportedModelError("the model's chat template writes nothing for a picture, so it has no place")
    return written


def _turn(text: str, images: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]


def _special_tokens(tokenizer: Any) -> list[str]:
    """Added tokens that look like markup; words and white space may be added tokens too."""
    return [token for token in tokenizer.get_added_vocab() if token.strip() and not token.isalnum()]


def _difference(longer: Sequence[str], shorter: Sequence[str]) -> Sequence[str]:
    """What `longer` has between the beginning and the end that it shares with `shorter`."""
    start = 0
    while start < min(len(longer), len(shorter)) and longer[start] == shorter[start]:
        start += 1
    end = 0
    while end < min(len(longer), len(shorter)) - start and longer[-1 - end] == shorter[-1 - end]:
        end += 1
    return longer[start : len(longer) - end]


def written_around(processor: Any) -> tuple[str, str]:
    """Text that the processor, not the template, writes before and after a picture (Gemma 3: two newlines)."""
    sequence = getattr(processor, "full_image_sequence", None)
    tokenizer = getattr(processor, "tokenizer", None)
    begin, end = (getattr(tokenizer, name, None) for name in ("boi_token", "eoi_token"))
    if not (isinstance(sequence, str) and isinstance(begin, str) and isinstance(end, str)):
        return "", ""
    return sequence.partition(begin)[0], sequence.rpartition(end)[2]
