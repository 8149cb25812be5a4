"""A chat template that gives in llama.cpp the prompt that it gives in transformers.

Templates of vision-language models look at image *parts* (``content[0]['type'] == 'image'``); llama.cpp replaces those
by a marker in a string before the template runs, so that such a template writes another prompt there, silently. Every
rewrite is checked by rendering the same conversations both ways (`vlmexport.lower.gguf.template_engines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from vlmexport.lower.gguf.template_engines import Messages, hf_render, llama_render
from vlmexport.runtime.llamacpp.bindings import MARKER

# All of llama.cpp's markers begin like this: mtmd's default, and the random ones of llama-server.
_MARKER_START = "<__media_"


@dataclass(frozen=True)
class ImagePlace:
    """What a template writes for one picture, and what the processor writes around that (llama.cpp writes neither).

    For Qwen2-VL ``<|vision_start|><|image_pad|><|vision_end|>`` is `text`; for Gemma 3 two line breaks are on both
    sides of it. `start` puts a space in front of a prompt where the tokenizer would and llama.cpp does not
    (`vlmexport.runtime.llamacpp.prompt.spaced_start`).
    """

    text: str
    before: str = ""
    after: str = ""
    start: Callable[[str], str] = str

    def marked(self, prompt: str, marker: str = MARKER) -> str:
        """`prompt` as llama.cpp should get it, with `marker` for each picture."""
        return self.start(prompt).replace(self.text, self.before + marker + self.after)


@dataclass(frozen=True)
class TemplateResult:
    """The template for the GGUF file.

    `agrees`: llama.cpp renders it as transformers renders the original, in every conversation of `conversations`.
    `reason` says why it was changed, or where they differ.
    """

    text: str
    changed: bool
    agrees: bool
    reason: str


def gguf_template(
    template: str, place: ImagePlace, special_tokens: Mapping[str, str], own: Mapping[str, str]
) -> TemplateResult:
    """The template itself where llama.cpp renders it alike, else the first rewrite that it does render alike.

    `special_tokens` are ``bos_token``, ``eos_token`` and whatever else transformers hands to the template, `own` the
    two that llama.cpp hands to it.
    """
    check = _Check(template, place, special_tokens, own)
    difference = check.difference(template)
    if not difference:
        return TemplateResult(template, changed=False, agrees=True, reason="")
    left = ""
    for rewrite in _rewrites(template, place, {**dict.fromkeys(own, ""), **special_tokens}, own):
        left = check.difference(rewrite)
        if not left:
            reason = f"rewritten for llama.cpp, which gives images to the template as text: {difference}"
            return TemplateResult(rewrite, changed=True, agrees=True, reason=reason)
    return TemplateResult(template, changed=False, agrees=False, reason=f"{difference}; no rewrite helps: {left}")


def conversations() -> dict[str, Messages]:
    """The conversations that a template is checked with, in transformers' typed form."""
    question, image = _text("What is in the picture?"), {"type": "image"}
    system = _message("system", _text("You are helpful."))
    one, again = _message("user", image, question), _message("user", _text("And what else?"))
    answer = _message("assistant", _text("A red square."))
    return {
        "an image and a question": [one],
        "a question": [_message("user", question)],
        "two images and a question": [_message("user", image, image, question)],
        "a question and an image": [_message("user", question, image)],
        "a system message, an image and a question": [system, one],
        "two turns": [one, answer, again],
        "two turns without an image": [_message("user", question), answer, again],
    }


@dataclass(frozen=True)
class _Check:
    """Both renderings of all conversations, of `original` in transformers and of a candidate in llama.cpp."""

    original: str
    place: ImagePlace
    special_tokens: Mapping[str, str]
    own: Mapping[str, str]

    def difference(self, candidate: str) -> str:
        """The first conversation that llama.cpp renders otherwise; "" when there is none.

        A conversation that transformers itself refuses (no system role, say) is none to compare.
        """
        for name, messages in conversations().items():
            try:
                wanted = self.place.marked(hf_render(self.original, messages, self.special_tokens))
            except (TemplateError, TypeError, ValueError):
                continue
            images = sum(part["type"] == "image" for message in messages for part in message["content"])
            if (places := wanted.count(MARKER)) != images:
                return f"{name}: the template writes {self.place.text!r} {places} times for {images} images"
            for handed in _as_clients_send(messages):
                try:
                    got = llama_render(candidate, handed, self.own)
                except (TemplateError, TypeError, ValueError) as error:
                    return f"{name}: llama.cpp refuses it ({error})"
                if got != wanted:
                    return f"{name}: transformers gives {_around(wanted, got)}, llama.cpp {_around(got, wanted)}"
        return ""


def _rewrites(
    template: str, place: ImagePlace, special_tokens: Mapping[str, str], own: Mapping[str, str]
) -> Iterator[str]:
    """Known ways to write a template anew, gentlest first."""
    rewrites = list(_without_space(template, place, special_tokens, own))
    yield from rewrites
    if place.start("word") != "word":
        yield from ("{{ ' ' }}" + rewrite for rewrite in (template, *rewrites))


def _without_space(
    template: str, place: ImagePlace, special_tokens: Mapping[str, str], own: Mapping[str, str]
) -> Iterator[str]:
    names = "".join(
        f"{{%- set {name} = {_literal(text)} -%}}"
        for name, text in special_tokens.items()
        if name in template and own.get(name) != text
    )
    if names:
        yield f"{names}{{{{- '' }}}}{template}"
    for contents in (_STRINGS, _PARTS):
        yield _TO_PARTS.replace("@contents@", contents).replace("@names@", names) + template + _to_marker(place)


# Messages with markers have a string; a template that knows no strings is handed one text part instead.
_STRINGS = "message['content'] if message['content'] is string else ''"
_PARTS = "message['content'][0]['text'] if message['content'] is not string and message['content'] else ''"

# Turns a text with markers back into parts, lets the template write what it writes for image parts, and puts the
# marker in the place of that. Only what llama.cpp's engine knows: no list.append, no str.partition.
_TO_PARTS = (
    "{%- set media = namespace(marker='', messages=[], parts=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = @contents@ -%}"
    f"{{%- if '{_MARKER_START}' in text -%}}"
    f"{{%- set pieces = text.split('{_MARKER_START}') -%}}"
    "{%- set media.parts = [{'type': 'text', 'text': pieces[0]}] if pieces[0] else [] -%}"
    "{%- for piece in pieces[1:] -%}"
    "{%- set media.parts = media.parts + [{'type': 'image'}] -%}"
    f"{{%- set media.marker = '{_MARKER_START}' + piece.split('>')[0] + '>' -%}}"
    "{%- set rest = piece.split('>', 1)[1] -%}"
    "{%- if rest -%}{%- set media.parts = media.parts + [{'type': 'text', 'text': rest}] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set media.messages = media.messages + [{'role': message['role'], 'content': media.parts}] -%}"
    "{%- else -%}"
    "{%- set media.messages = media.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = media.messages -%}@names@"
    "{%- set prompt -%}{{- '' }}"
)


def _to_marker(place: ImagePlace) -> str:
    image = f"{_literal(place.before)} + media.marker + {_literal(place.after)}"
    written = f"prompt.replace({_literal(place.text)}, {image}) if media.marker else prompt"
    return f"{{{{- '' }}}}{{%- endset -%}}{{{{- {written} -}}}}"


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"'{escaped}'"


def _as_clients_send(messages: Messages) -> Iterator[Messages]:
    """Messages without images come as text parts or as plain strings; both must do."""
    yield messages
    yield [
        {**m, "content": m["content"][0]["text"]} if [p["type"] for p in m["content"]] == ["text"] else m
        for m in messages
    ]


def _around(text: str, other: str) -> str:
    """Where `text` stops being like `other`."""
    start = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, start - 12) : start + 24])


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _message(role: str, *parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}
