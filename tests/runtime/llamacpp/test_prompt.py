"""Prompts with markers, from the chat templates of many families."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from PIL import Image

from tests.families.tiny_text import byte_level_tokenizer
from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.runtime.llamacpp.bindings import MARKER
from vlmexport.runtime.llamacpp.prompt import TextBuilder, image_place, marked_prompt, prompt_builder
from vlmexport.runtime.prompt import PromptBuilder

GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def template(before: str, image: str, after: str, text: str = "{{ c['text'] }}") -> str:
    return (
        f"{{% for m in messages %}}{before}{{% for c in m['content'] %}}"
        f"{{% if c['type'] == 'image' %}}{image}{{% else %}}{text}{{% endif %}}{{% endfor %}}{after}{{% endfor %}}"
    )


class Fake(PromptBuilder):
    """A builder of a template and a set of added tokens, without files."""

    def __init__(self, source: str, added: list[str], **attributes: Any) -> None:
        self.tokenizer = SimpleNamespace(get_added_vocab=lambda: dict.fromkeys(added, 0))
        self.processor = SimpleNamespace(chat_template=source, apply_chat_template=self._apply, **attributes)

    def _apply(self, messages: list[dict[str, Any]], **_options: Any) -> str:
        return jinja2.Template(self.processor.chat_template).render(messages=messages)


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
CHATML = ["<|im_start|>", "<|im_end|>"]
CASES = {
    "qwen": (template("<|im_start|>user\n", QWEN, "<|im_end|>"), [*CHATML, *QWEN.replace("><", "> <").split()], QWEN),
    "llava": (template("USER: ", "<image>\n", " ASSISTANT:"), ["<image>"], "<image>"),
    "pixtral": (template("<s>[INST]", "[IMG]", "[/INST]"), ["<s>", "[INST]", "[/INST]", "[IMG]"], "[IMG]"),
    "internvl": (template(CHATML[0], "<IMG_CONTEXT>\n", CHATML[1]), [*CHATML, "<IMG_CONTEXT>"], "<IMG_CONTEXT>"),
    "a word that is no special token": (template("Human: ", "(image)", "\n"), [], "(image)"),
    "spaces that change": (
        template("User:", "<image>", "<end>", " {{ c['text'] }}"), ["<image>", "<end>", "\n\n", "word"], "<image>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_marker_takes_the_place_of_all_that_stands_for_a_picture(name: str) -> None:
    source, added, place = CASES[name]
    builder = Fake(source, added)
    assert image_place(builder) == place
    rendered = marked_prompt(builder, "What?", 2, MARKER)
    assert rendered.count(MARKER) == 2
    assert place not in rendered
    pictures = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    assert rendered.replace(MARKER, place) == builder.render([{"role": "user", "content": pictures}])


def test_text_that_the_processor_writes_around_a_picture_is_kept() -> None:
    builder = Fake(
        template("<bos>user\n", "<start_of_image>", "<end>"),
        ["<bos>", "<end>", "<start_of_image>", "<end_of_image>"],
        tokenizer=SimpleNamespace(boi_token="<start_of_image>", eoi_token="<end_of_image>"),
        full_image_sequence="\n\n<start_of_image><soft><soft><end_of_image>\n\n",
    )
    assert marked_prompt(builder, "What?", 1, MARKER) == f"<bos>user\n\n\n{MARKER}\n\nWhat?<end>"


def test_the_processor_of_gemma3() -> None:
    """The real processor: what it writes around a picture, as it expands it."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = byte_level_tokenizer((*GEMMA.values(), "<end_of_turn>"), 320)
    for name, token in GEMMA.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    source = template("user\n", GEMMA["boi_token"], "<end_of_turn>")
    pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    builder = PromptBuilder.__new__(PromptBuilder)
    builder.processor = Gemma3Processor(pixels, tokenizer, chat_template=source, image_seq_length=4)
    builder.tokenizer = tokenizer
    rendered = marked_prompt(builder, "What?", 1, MARKER)
    assert rendered == f"user\n\n\n{MARKER}\n\nWhat?<end_of_turn>"
    made = builder.build([Image.new("RGB", (32, 32))], "What?")
    spelled = rendered.replace(MARKER, GEMMA["boi_token"] + 4 * GEMMA["image_token"] + GEMMA["eoi_token"])
    assert made.input_ids[0].tolist() == tokenizer(spelled, add_special_tokens=False)["input_ids"]


def test_the_bundled_model() -> None:
    builder = PromptBuilder(model_dir())
    assert image_place(builder) == "<image>"
    plain = marked_prompt(builder, "What?", 0, MARKER)
    assert plain == builder.render([{"role": "user", "content": [{"type": "text", "text": "What?"}]}])


def test_a_chat_of_several_turns() -> None:
    builder = PromptBuilder(model_dir())
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image"}]},
    ]
    assert marked_prompt(builder, chat, 2, MARKER).replace(MARKER, "<image>") == builder.render(chat)


def test_words_that_stand_for_pictures_are_refused() -> None:
    builder = PromptBuilder(model_dir())
    with pytest.raises(BadInputError, match="must not contain '<__media__>'"):
        marked_prompt(builder, f"What is {MARKER}?", 1, MARKER)
    with pytest.raises(BadInputError, match="2 places '<image>' for 1 pictures"):
        marked_prompt(builder, "What is <image>?", 1, MARKER)


def test_a_template_that_has_no_pictures_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="writes nothing for a picture"):
        marked_prompt(Fake(template("<u>", "", "</u>"), ["<u>", "</u>"]), "What?", 1, MARKER)


def test_the_tokenizer_alone_renders_the_same(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((model_dir() / name).read_bytes())
    broken = {"processor_class": "Idefics3Processor", "image_processor_type": "NoSuchImageProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(broken))
    builder = prompt_builder(tmp_path)
    assert isinstance(builder, TextBuilder)
    whole = prompt_builder(model_dir())
    assert not isinstance(whole, TextBuilder)
    assert marked_prompt(builder, "What?", 2, MARKER) == marked_prompt(whole, "What?", 2, MARKER)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="the tokenizer does not load"):
        prompt_builder(tmp_path)
