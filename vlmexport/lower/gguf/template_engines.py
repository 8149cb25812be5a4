"""What a chat template gives in transformers and in llama.cpp, which hands it other messages.

llama.cpp (common/chat.cpp, common/jinja/caps.cpp, b11549) puts a text marker where an image part was, joins the parts
of such a message to one string, and hands that over as a string, or as one text part when it finds that the template
knows no strings. `llama_render` does the same around Jinja itself; tests compare it with llama.cpp's own engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeAlias

from jinja2 import Template, TemplateError

from vlmexport.runtime.llamacpp.bindings import MARKER

Messages: TypeAlias = Sequence[Mapping[str, Any]]

_PROBE = "STRING_MARKER"


def hf_render(template: str, messages: Messages, special_tokens: Mapping[str, str]) -> str:
    """The prompt that transformers renders of typed messages; raises jinja2's `TemplateError` where it would."""
    return str(_compiled(template).render(messages=messages, add_generation_prompt=True, **special_tokens))


def llama_render(template: str, messages: Messages, special_tokens: Mapping[str, str], marker: str = MARKER) -> str:
    """The prompt that llama.cpp renders of the same messages, with `marker` for each image part.

    Raises `TemplateError` where llama.cpp would refuse. Only BOS and EOS of `special_tokens` reach the template.
    """
    compiled = _compiled(template)
    strings, parts = _abilities(compiled)
    handed = [_normalized(_joined(message, marker), strings, parts) for message in messages]
    tokens = {name: special_tokens.get(name, "") for name in ("bos_token", "eos_token")}
    return str(compiled.render(messages=handed, add_generation_prompt=True, enable_thinking=True, **tokens))


def _compiled(template: str) -> Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled: Template = _compile_jinja_template(template)
    return compiled


def _joined(message: Mapping[str, Any], marker: str) -> dict[str, Any]:
    """A message with images has one string: texts joined by line breaks, none beside a marker."""
    content = message["content"]
    if isinstance(content, str) or all(part["type"] == "text" for part in content):
        return {**message, "content": _String(content) if isinstance(content, str) else _Parts(content)}
    return {**message, "content": _String(_concatenated(content, marker))}


def _concatenated(parts: Sequence[Mapping[str, Any]], marker: str) -> str:
    text, after_marker = "", False
    for part in parts:
        image = part["type"] != "text"
        text += ("\n" if text and not image and not after_marker else "") + (marker if image else str(part["text"]))
        after_marker = image
    return text


def _normalized(message: dict[str, Any], strings: bool, parts: bool) -> dict[str, Any]:
    content = message["content"]
    if parts and not strings and isinstance(content, str):
        return {**message, "content": _Parts([{"type": "text", "text": content}])}
    if strings and not parts and not isinstance(content, str):
        return {**message, "content": _String(_concatenated(content, ""))}
    return message


def _abilities(template: Template) -> tuple[bool, bool]:
    """Whether llama.cpp finds that a template takes content as strings, and as lists of parts (``caps_get``)."""
    probe = _String(_PROBE)
    rendered = _try(template, probe)
    as_list = probe.read_as_list
    strings = rendered is not None and not (as_list and _PROBE not in rendered)
    if probe.tested:
        empty = _Parts([])
        if _try(template, empty) is not None and empty.read_as_list:
            as_list = True
    return strings, as_list


def _try(template: Template, content: _String | _Parts) -> str | None:
    messages = [{"role": "user", "content": content}]
    try:
        return str(template.render(messages=messages, tools=[], bos_token="", eos_token="", add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, AttributeError):
        return None


class _String(str):
    """A string that cannot be looped over, as in llama.cpp, and remembers whether it was read as a list or tested."""

    read_as_list = False
    tested = True  # ``is string`` cannot be seen from here; assuming it costs one more probe, which proves it

    def __iter__(self) -> Iterator[str]:
        self.read_as_list = True
        raise TypeError("llama.cpp does not loop over strings")

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        self.read_as_list |= not isinstance(index, slice)
        return super().__getitem__(index)


class _Parts(list[Mapping[str, Any]]):
    """A list that remembers whether it was looped over or indexed."""

    read_as_list = False

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self.read_as_list = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.read_as_list = True
        return super().__getitem__(index)
