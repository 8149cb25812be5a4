"""Who writes the places of pictures in prompts without a template, found by asking the processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.model.bare_prompt import BarePrompt, bare_prompt

_TOKEN, _ID = "<image>", 7


class _Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == _TOKEN
        return _ID


class _Processor:
    """Two image tokens for each picture: of those in the text, of its own, or both."""

    image_token: Any = _TOKEN
    tokenizer = _Tokenizer()

    def __init__(self, writes: str, several: bool = True) -> None:
        self.writes, self.several = writes, several

    def __call__(self, text: list[str], images: list[list[Any]], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        given, pictures = text[0].count(_TOKEN), len(images[0])
        if self.writes == "always":
            if given:
                raise ValueError("the text has places of pictures already")
            given = pictures if self.several else 1
        elif self.writes == "before":
            given += 1
        elif self.writes == "when there is none":
            given = given or pictures
        elif given != pictures:
            raise ValueError("other pictures than places")
        return {"input_ids": torch.tensor([[1, *[_ID] * (2 * given), 3]])}


@pytest.mark.parametrize(
    ("processor", "itself", "several"),
    [
        (_Processor("never"), False, True),
        (_Processor("when there is none"), False, True),
        (_Processor("always"), True, True),
        (_Processor("always", several=False), True, False),
        (_Processor("before"), True, False),
    ],
)
def test_the_processor_is_asked(processor: _Processor, itself: bool, several: bool) -> None:
    assert bare_prompt(processor) == BarePrompt(_TOKEN, itself, several)


def test_the_text_has_the_places_that_the_processor_does_not_write() -> None:
    assert BarePrompt(_TOKEN).text(2, "what?") == "<image><image>what?"
    assert BarePrompt(_TOKEN, places_itself=True, several=False).text(1, "what?") == "what?"
    with pytest.raises(BadInputError, match=r"^the model's processor takes one picture with a prompt, not 2$"):
        BarePrompt(_TOKEN, places_itself=True, several=False).text(2, "what?")


def test_a_processor_without_an_image_token_has_no_bare_prompts() -> None:
    class Nothing:
        pass

    assert bare_prompt(Nothing()) is None
