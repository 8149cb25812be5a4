"""Chat templates: the same prompt from llama.cpp as from transformers."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xllamacpp
from PIL import Image
from tokenizers import Tokenizer

from tests.lower.gguf import tokenizers_for_tests as make
from tests.lower.gguf.chat_templates import BUNDLED, FIRST_PART, IMAGE, TEMPLATES, TOKENS
from tests.lower.gguf.llama_vocabulary import LlamaVocabulary
from tools.train_fixture.gguf_files import write_mmproj, write_text
from vlmexport.demo import model_dir
from vlmexport.lower.gguf.template import ImagePlace, conversations, gguf_template
from vlmexport.lower.gguf.template_engines import Messages, hf_render, llama_render
from vlmexport.lower.gguf.vocab import read_vocabulary
from vlmexport.runtime.llamacpp.bindings import MARKER
from vlmexport.runtime.prompt import PromptBuilder


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_agrees_as_it_is_or_rewritten(name: str) -> None:
    template, place, rewritten = TEMPLATES[name]
    result = gguf_template(template, place, TOKENS, TOKENS)
    assert result.agrees
    assert result.changed == rewritten
    assert bool(result.reason) == rewritten
    assert (result.text == template) != rewritten


def test_the_mismatch_that_the_rewrite_is_for() -> None:
    one = conversations()["an image and a question"]
    assert hf_render(FIRST_PART, one, TOKENS).startswith("<|im_start|>User:<image>What")
    assert llama_render(FIRST_PART, one, TOKENS).startswith(f"<|im_start|>User: {MARKER}What")
    rewritten = gguf_template(FIRST_PART, IMAGE, TOKENS, TOKENS).text
    assert llama_render(rewritten, one, TOKENS).startswith(f"<|im_start|>User:{MARKER}What")


def test_the_random_markers_of_the_server_are_known() -> None:
    rewritten = gguf_template(FIRST_PART, IMAGE, TOKENS, TOKENS).text
    two = conversations()["two images and a question"]
    got = llama_render(rewritten, two, TOKENS, "<__media_Xy12__>")
    assert got == IMAGE.marked(hf_render(FIRST_PART, two, TOKENS), "<__media_Xy12__>")


def test_a_template_that_no_rewrite_helps_says_where_it_differs() -> None:
    numbered = FIRST_PART.replace("'<image>'", "'<image_' ~ loop.index ~ '>'")
    result = gguf_template(numbered, ImagePlace("<image_1>"), TOKENS, TOKENS)
    assert not result.agrees
    assert not result.changed
    assert result.text == numbered
    assert "two images and a question: the template writes '<image_1>' 1 times for 2 images" in result.reason
    silent = gguf_template(BUNDLED.replace("<image>", ""), IMAGE, TOKENS, TOKENS)
    assert not silent.agrees
    assert "the template writes '<image>' 0 times for 1 images" in silent.reason


def test_tokens_that_llama_cpp_would_not_name() -> None:
    template = "{{ bos_token }}" + BUNDLED + "{{ pad_token }}"
    named = {**TOKENS, "pad_token": "<pad>"}
    result = gguf_template(template, IMAGE, named, {"bos_token": "!", "eos_token": "</s>"})
    assert result.agrees
    assert result.text.startswith("{%- set bos_token = '<s>' -%}{%- set pad_token = '<pad>' -%}")
    assert "eos_token" not in result.text


def test_the_space_that_only_transformers_puts_in_front(tmp_path: Path) -> None:
    chat = "{% for m in messages %}USER:{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
    chat += "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    size = make.save(make.spaced(None, first, complete=True), tmp_path, chat_template=chat)
    vocabulary = read_vocabulary(tmp_path, "llama", size)
    assert vocabulary.template is not None
    assert vocabulary.template.agrees
    for messages in conversations().values():
        rendered = hf_render(chat, messages, TOKENS)
        wanted = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(rendered, add_special_tokens=False).ids
        with LlamaVocabulary(vocabulary.metadata, tmp_path) as llama:
            got = llama_render(vocabulary.template.text, messages, TOKENS).replace(MARKER, "<image>")
            assert llama.tokenize(got) == wanted
            assert llama.tokenize(rendered) != wanted


def test_transformers_renders_as_here() -> None:
    builder = PromptBuilder(model_dir())
    special = read_vocabulary(model_dir(), "llama", 512)
    assert special.template is not None
    assert special.template.agrees
    for messages in conversations().values():
        assert builder.render(list(messages)) == hf_render(BUNDLED, messages, {})  # type: ignore[arg-type]


def test_a_checkpoint_whose_template_is_rewritten(tmp_path: Path, tiny_idefics3: Path) -> None:
    vocabulary = read_vocabulary(tiny_idefics3, "llama", 448)
    assert vocabulary.template is not None
    assert vocabulary.template.changed
    assert vocabulary.metadata["tokenizer.chat_template"] == vocabulary.template.text
    assert vocabulary.notes == ()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return write_text(model_dir(), folder / "text.gguf"), write_mmproj(model_dir(), folder / "mmproj.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_servers_own_engine_gives_the_same(name: str, files: tuple[Path, Path]) -> None:
    template, place, _ = TEMPLATES[name]
    for text in dict.fromkeys([template, gguf_template(template, place, TOKENS, TOKENS).text]):
        server = _server(files, text)
        facts = _ask(server, "/props")
        own = {"bos_token": facts["bos_token"], "eos_token": facts["eos_token"]}
        for messages in _handed():
            got = _ask(server, "/apply-template", {"messages": _openai(messages)})["prompt"]
            assert got == llama_render(text, messages, own, facts["media_marker"])


@pytest.mark.slow
def test_llama_server_prompts_like_transformers(files: tuple[Path, Path]) -> None:
    server = _server(files, gguf_template(FIRST_PART, IMAGE, TOKENS, TOKENS).text)
    marker = _ask(server, "/props")["media_marker"]
    for messages in conversations().values():
        got = _ask(server, "/apply-template", {"messages": _openai(messages)})["prompt"]
        assert got == IMAGE.marked(hf_render(FIRST_PART, messages, TOKENS), marker)


def _server(files: tuple[Path, Path], template: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = map(str, files)
    params.chat_template, params.use_jinja = template, True
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 512, 1, 1, False
    return xllamacpp.Server(params)


def _ask(server: Any, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def _handed() -> Iterator[Messages]:
    for messages in conversations().values():
        yield messages
        yield [m if len(m["content"]) > 1 else {**m, "content": m["content"][0]["text"]} for m in messages]


def _openai(messages: Messages) -> list[dict[str, Any]]:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    url = {"url": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()}
    image = {"type": "image_url", "image_url": url}
    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [_part(p, image) for p in m["content"]]}
        for m in messages
    ]


def _part(part: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    return image if part["type"] == "image" else part
