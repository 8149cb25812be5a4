"""Prompts as users of llama.cpp get them: the chat template of the GGUF file itself, with markers for pictures.

llama.cpp replaces every picture of a chat by its marker before it renders the template, and joins the parts of such a
message to one string; its server hands a message without pictures over as parts, its command line as a string. What
it makes of either depends on whether the template takes strings, parts or both (common/chat.cpp, b11549).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import ArtifactError
from vlmexport.runtime.llamacpp.chunks import IMAGE_ID, ImageChunk, LlamaPrompt
from vlmexport.verify.gguf.files import GgufFile

# A token that llama.cpp looks up and does not find is -1 too; here it is told apart from a row of an image.
NO_TOKEN = -2
_TEXT_PROBE = "STRING_MARKER"


class _WatchedList(list[Any]):
    """A list that knows whether a template looked into it."""

    looked = False

    def __iter__(self) -> Any:
        self.looked = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.looked = True
        return super().__getitem__(index)


@dataclass(frozen=True)
class Views:
    """One question as llama-server and as llama-mtmd-cli put it into words, markers included."""

    server: str
    cli: str


class ChatTemplate:
    """The template in a text GGUF; raises `ArtifactError` when it has none or it is no template."""

    def __init__(self, text: GgufFile) -> None:
        source = text.value("tokenizer.chat_template")
        if not isinstance(source, str) or not source:
            raise ArtifactError(f"{text.path.name} has no tokenizer.chat_template")
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._error = TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: _now(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ArtifactError(f"the chat template of {text.path.name} is no template: {error}") from error
        self._tokens = {"bos_token": text.token("bos_token_id"), "eos_token": text.token("eos_token_id")}
        self.takes_parts = self._takes_parts()
        self.takes_text = self._takes_text()

    def views(self, images: int, text: str, marker: str) -> Views:
        """Both views of one user turn: pictures first, then `text`. Raises `ArtifactError` when it does not render."""
        joined = marker * images + text
        parts = [{"type": "text", "text": joined}]
        cli = self._render(joined if self.takes_text else parts)
        return Views(server=self._render(parts) if self.takes_parts and not images else cli, cli=cli)

    def _render(self, content: Any) -> str:
        messages = [{"role": "user", "content": content}]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except (self._error, TypeError, KeyError, ValueError) as error:
            raise ArtifactError(f"the chat template does not render: {error}") from error

    def _takes_parts(self) -> bool:
        watched = _WatchedList([{"type": "text", "text": _TEXT_PROBE}])
        try:
            self._render(watched)
        except ArtifactError:
            return False
        return watched.looked

    def _takes_text(self) -> bool:
        try:
            return not self.takes_parts or _TEXT_PROBE in self._render(_TEXT_PROBE)
        except ArtifactError:
            return not self.takes_parts


def ids_fault(found: NDArray[np.int64], wanted: NDArray[np.int64], image_token_id: int) -> str:
    """How llama.cpp's ids differ from Hugging Face's, or ``""``.

    `found` has -1 where a row of image embeddings stands, `wanted` the image token. A token of the model's own between
    two image tokens (Pixtral's line break) may be a row of image embeddings in llama.cpp.
    """
    ours = np.where(wanted == image_token_id, IMAGE_ID, wanted)
    rows, expected = int((found == IMAGE_ID).sum()), int((ours == IMAGE_ID).sum())
    if len(found) != len(ours):
        images = f", {rows} of them image rows where the model has {expected}" if rows != expected else ""
        missing = f", {lost} of them in no vocabulary" if (lost := int((found == NO_TOKEN).sum())) else ""
        return f"{len(found)} tokens where the model has {len(ours)}{images}{missing}"
    if (found == NO_TOKEN).any():
        return "llama.cpp writes tokens around pictures that the vocabulary does not have (tokenizer/image_tokens)"
    different = np.nonzero((found != ours) & ~((found == IMAGE_ID) & _between_image_tokens(ours)))[0]
    if not len(different):
        return ""
    first = int(different[0])
    return f"token {first} is {int(found[first])}, the model's {int(ours[first])} ({len(different)} differ)"


def _between_image_tokens(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where the tokens before and after are image tokens (the last line break follows one only)."""
    image = ids == IMAGE_ID
    before = np.concatenate([[False], image[:-1]])
    after = np.concatenate([image[1:], [False]])
    inner: NDArray[np.bool_] = before & after
    return inner


def prompt_ids(prompt: LlamaPrompt) -> NDArray[np.int64]:
    """The ids of a prompt, int64 ``[tokens]``: -1 for rows of images, `NO_TOKEN` for tokens that do not exist."""
    ids = prompt.ids.copy()
    start = 0
    for chunk in prompt.chunks:
        stop = start + (chunk.tokens if isinstance(chunk, ImageChunk) else len(chunk.ids))
        if not isinstance(chunk, ImageChunk):
            ids[start:stop][ids[start:stop] == IMAGE_ID] = NO_TOKEN
        start = stop
    return ids


def first_difference(found: str, wanted: str) -> str:
    """Where two texts part, for a sentence."""
    same = 0
    while same < min(len(found), len(wanted)) and found[same] == wanted[same]:
        same += 1
    start = max(0, same - 12)
    return f"...{found[start : same + 24]!r} where the model has ...{wanted[start : same + 24]!r}"


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> str:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
