"""The tokens of a text, and those that llama.cpp writes around pictures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.tokens import check_tokenizer, check_written_tokens, probe_texts


class Letters:
    """A tokenizer of single letters with one added token."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def get_added_vocab(self):
        return {"<image>": 5, "<b>": 3}


def runner(change=None):
    def tokenize(text, *, special):
        assert special is False
        ids = [ord(c) for c in text]
        return change(text, ids) if change else ids

    return SimpleNamespace(tokenize=tokenize)


def judged(*arguments):
    gate = Gate()
    check_tokenizer(gate, *arguments)
    return gate.checks[0]


def test_every_added_token_is_in_a_probe():
    texts = probe_texts(Letters())
    assert texts[-1] == "x<b>x<image> end"
    assert any("12345678" in text for text in texts)


def test_equal_ids_pass_and_others_name_the_first_difference():
    recorded = ("ab", [97, 98])
    assert judged(runner(), Letters(), recorded).status == "passed"
    other = runner(lambda text, ids: [*ids[:3], 0, *ids[4:]] if "<image>" in text else ids)
    check = judged(other, Letters(), recorded)
    assert check.status == "failed"
    assert (
        check.reason == "'x<b>x<image> end': from token 3 llama.cpp has [0, 120, 60, 105], the model [62, 120, 60, 105]"
    )


def test_ids_that_an_export_recorded_are_the_models_and_llama_cpps():
    assert "that the export recorded are not those" in judged(runner(lambda _t, _i: [1]), Letters(), ("a", [1])).reason
    assert judged(runner(), None, ("a", [1])).status == "failed"
    assert judged(runner(), None, ("a", [97])).status == "passed"


def test_without_any_word_of_what_to_expect_nothing_is_passed():
    assert judged(runner(), None, None).status == "not_run"


def pair(projector, tokens):
    keys = {"clip.projector_type": projector}
    return SimpleNamespace(text=SimpleNamespace(tokens=tokens), mmproj=SimpleNamespace(value=keys.get))


@pytest.mark.parametrize(
    ("tokens", "missing"),
    [
        (["ĊĊ", "Ċ", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"], None),
        (["\n\n", "<0x0A>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"], None),
        (["Ċ", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"], r"'\n\n' is not one token"),
        (["ĊĊ", "Ċ", "<fake_token_around_image>", "<row_1_col_1>"], "'<global-img>' is not one token"),
    ],
)
def test_tokens_around_pictures_are_looked_for_in_every_spelling(tokens, missing):
    gate = Gate()
    check_written_tokens(gate, pair("idefics3", tokens))
    assert gate.checks[0].status == ("failed" if missing else "passed")
    assert (missing or "") in gate.checks[0].reason


def test_what_an_unknown_projector_writes_is_not_judged():
    gate = Gate()
    check_written_tokens(gate, pair("new", []))
    assert gate.checks[0].status == "not_run"
    assert "of a new projector" in gate.checks[0].reason
