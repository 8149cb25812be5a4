from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from vlmexport.runtime.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_idefics3):
    return AutoTokenizer.from_pretrained(tiny_idefics3)


def pieces(tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    out = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        out.append(stream.push(token))
        if stream.stopped:
            break
    out.append(stream.finish())
    return out, stream


@pytest.mark.parametrize("text", [" a red square", "größe 猫 🐈‍⬛ ok", "🐈" * 12, "", "  two  spaces \n\n"])
def test_pieces_make_the_text_and_are_whole(tokenizer, text: str) -> None:
    out, stream = pieces(tokenizer, text)
    assert "".join(out) == text == stream.text
    assert not any("\ufffd" in piece for piece in out)


def test_an_incomplete_end_is_shown_at_the_finish(tokenizer) -> None:
    stream = TextStream(tokenizer)
    first = tokenizer("猫", add_special_tokens=False)["input_ids"][0]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_not_text(tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.eos_token_id) == ""
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("circle",), "a red square and a "),
        (("re sq", "and"), "a red square "),
        (("nothing",), None),
        (("", "q"), "a red s"),
    ],
)
def test_stop_texts_end_the_answer(tokenizer, stop: tuple[str, ...], expected: str | None) -> None:
    text = "a red square and a circle there"
    out, stream = pieces(tokenizer, text, stop)
    assert "".join(out) == stream.text == (text if expected is None else expected)
    assert stream.stopped == (expected is not None)


def test_a_beginning_of_a_stop_text_is_held_back(tokenizer) -> None:
    stream = TextStream(tokenizer, ("xyz",))
    shown = [stream.push(t) for t in tokenizer("x", add_special_tokens=False)["input_ids"]]
    assert "".join(shown) == ""
    assert stream.finish() == "x"
