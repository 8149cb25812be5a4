"""llama.cpp's view of a chat template, and where two prompts part."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vlmexport.errors import ArtifactError
from vlmexport.runtime.llamacpp.chunks import ImageChunk, LlamaPrompt, TextChunk
from vlmexport.verify.gguf.prompts import NO_TOKEN, ChatTemplate, first_difference, ids_fault, prompt_ids

LOOP = "{% for m in messages %}"
PARTS = LOOP + "{% for c in m['content'] %}{% if c['type'] == 'image' %}<i>{% else %}[{{ c['text'] }}]{% endif %}"
TEXT = LOOP + "[{{ m['content'] }}]{% endfor %}"


def template(source):
    file = SimpleNamespace(
        value=lambda key: source, token=lambda key: "<s>" if key == "bos_token_id" else "</s>",
        path=SimpleNamespace(name="t.gguf"),
    )  # fmt: skip
    return ChatTemplate(file)


def test_a_template_of_strings_gets_one_string():
    found = template(TEXT)
    assert (found.takes_parts, found.takes_text) == (False, True)
    views = found.views(2, "What?", "<M>")
    assert views.server == views.cli == "[<M><M>What?]"


def test_a_template_of_parts_gets_parts_and_the_command_line_one_part():
    found = template(PARTS + "{% endfor %}{% endfor %}")
    assert (found.takes_parts, found.takes_text) == (True, False)
    views = found.views(1, "What?", "<M>")
    assert views.server == views.cli == "[<M>What?]"


def test_a_template_of_both_gets_parts_from_the_server_only_without_pictures():
    both = (
        LOOP
        + "{% if m['content'] is string %}({{ m['content'] }}){% else %}"
        + PARTS.removeprefix(LOOP)
        + "{% endfor %}{% endif %}{% endfor %}"
    )
    found = template(both)
    assert (found.takes_parts, found.takes_text) == (True, True)
    views = found.views(1, "What?", "<M>")
    assert views.server == views.cli == "(<M>What?)"
    views = found.views(0, "What?", "<M>")
    assert (views.server, views.cli) == ("[What?]", "(What?)")


def test_what_a_template_may_use():
    source = (
        "{{ bos_token }}{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
        "{% for i in [1, 2] %}{% break %}{% endfor %}"
    )
    assert template(source).views(0, "é", "<M>").cli == '<s>[{"role": "user", "content": "é"}]4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "t.gguf has no tokenizer.chat_template"),
        ("{% for %}", "is no template"),
        ("{{ raise_exception('no images') }}", "does not render: no images"),
        ("{{ ''.__class__.__mro__ }}", "does not render"),
    ],
)
def test_what_is_no_template_is_refused(source, message):
    with pytest.raises(ArtifactError, match=message):
        template(source).views(1, "What?", "<M>")


def ids(*values):
    return np.array(values, np.int64)


def test_image_rows_stand_where_the_image_tokens_are():
    assert ids_fault(ids(1, -1, -1, 2), ids(1, 9, 9, 2), 9) == ""
    assert ids_fault(ids(1, -1, 3, 2), ids(1, 9, 9, 2), 9) == "token 2 is 3, the model's -1 (1 differ)"
    assert ids_fault(ids(1, -1, -1, -1), ids(1, 9, 9, 2), 9) == "token 3 is -1, the model's 2 (1 differ)"
    assert ids_fault(ids(-1, 1, -1, 2), ids(1, 9, 9, 2), 9) == "token 0 is -1, the model's 1 (2 differ)"
    assert "of them image rows" in ids_fault(ids(1, -1, 2), ids(1, 9, 9, 2), 9)
    assert ids_fault(ids(1, 2), ids(1, 2, 3), 9) == "2 tokens where the model has 3"


def test_a_token_that_llama_cpp_does_not_find_is_no_image_row():
    chunks = [TextChunk((1, -1, 3)), ImageChunk(0, 2, 2), TextChunk((4,))]
    found = prompt_ids(LlamaPrompt(chunks))
    assert found.tolist() == [1, NO_TOKEN, 3, -1, -1, 4]
    assert "that the vocabulary does not have" in ids_fault(found, ids(1, 8, 3, 9, 9, 4), 9)
    assert "1 of them in no vocabulary" in ids_fault(found, ids(1, 3, 9, 9, 4), 9)


def test_a_line_break_between_image_tokens_may_be_an_image_row():
    assert ids_fault(ids(1, -1, -1, -1, 2), ids(1, 9, 7, 9, 2), 9) == ""


def test_texts_part_where_they_differ():
    assert first_difference("User: <M>", "User:<M>") == "...'User: <M>' where the model has ...'User:<M>'"
