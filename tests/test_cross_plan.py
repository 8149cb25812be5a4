"""What is told of an encoder-decoder's answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vlmexport.cross_plan import answer_notes, fitting_words
from vlmexport.model.merge import MergeSpec


def _told(start: int | None, **asked: Any) -> tuple[str, ...]:
    split: Any = SimpleNamespace(merge=MergeSpec(1, decoder_start_token_id=start))
    vlm: Any = SimpleNamespace(model=SimpleNamespace(generation_config=SimpleNamespace(**asked)))
    return answer_notes(vlm, split)


def test_what_of_a_generation_config_is_not_applied_is_told() -> None:
    found = _told(2, num_beams=3, repetition_penalty=1.2, no_repeat_ngram_size=3, forced_bos_token_id=0)
    assert found == (
        "answers are made without what generation_config also asks for: num_beams 3, repetition_penalty 1.2",
    )


def test_nothing_is_told_where_nothing_is_asked_or_the_decoder_has_no_encoder() -> None:
    assert _told(2, num_beams=1, repetition_penalty=1.0, min_length=0, suppress_tokens=None) == ()
    assert _told(None, num_beams=3) == ()
    assert fitting_words(None) == ""
