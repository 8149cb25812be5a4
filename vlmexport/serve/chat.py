"""OpenAI's chat completions: the request, checked, and the bodies of the answers.

Follows the public API reference of ``POST /v1/chat/completions``. What would change the answer and is not done here
(tools, several choices, log probabilities) is refused. Taken and not used: keys that are null, those that ask for
nothing in an answer (`_WITHOUT_EFFECT`), a message's ``name``, and a picture's ``detail``: the model's own processor
says how large every picture is.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import BadInputError
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

DEFAULT_TOKENS = 256
_LARGEST = 1e6
_ROLES = ("system", "developer", "user", "assistant")
# Neither of these changes an answer of ours.
_WITHOUT_EFFECT = {
    "user",
    "store",
    "metadata",
    "stream_options",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
}
_KNOWN = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"}
# Refused unless they say what is done anyway.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
}


@dataclass(frozen=True)
class ChatRequest:
    """One request: `messages` as chat templates take them (a picture is ``{"type": "image"}``), `urls` in order."""

    model: str
    messages: list[dict[str, Any]]
    urls: tuple[str, ...]
    sampling: Sampling
    stream: bool
    usage_in_stream: bool


def parse_request(data: Any, limits: Limits) -> ChatRequest:
    """The request in the JSON value `data`. Raises `RefusedError` (400) naming the key that is wrong."""
    if not isinstance(data, dict):
        raise RefusedError(400, "the body must be a JSON object")
    for key in data.keys() - _KNOWN - _WITHOUT_EFFECT:
        if data[key] is not None and data[key] not in _DEFAULTS.get(key, ()):
            raise RefusedError(400, f"{key} is not supported by this server", key)
    messages, urls = _messages(data.get("messages"), limits)
    return ChatRequest(
        str(data.get("model", "")),
        messages,
        tuple(urls),
        _sampling(data, limits),
        _flag(data, "stream"),
        _wants_usage(data.get("stream_options")),
    )


def _messages(given: Any, limits: Limits) -> tuple[list[dict[str, Any]], list[str]]:
    if not isinstance(given, list) or not given:
        raise RefusedError(400, "messages must be a list with at least one message", "messages")
    messages: list[dict[str, Any]] = []
    urls: list[str] = []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise RefusedError(400, f"{where}.role must be one of {', '.join(_ROLES)}", where)
        content, found = _content(message.get("content"), where)
        for key in message.keys() - {"role", "content", "name"}:
            if message[key] not in (None, [], {}):
                raise RefusedError(400, f"{where}.{key} is not supported by this server", where)
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": content})
        urls += found
    parts: list[dict[str, str]] = [part for message in messages for part in message["content"]]
    texts = sum(len(part.get("text", "")) for part in parts)
    if texts > limits.text_bytes:
        raise RefusedError(400, f"the messages have {texts} characters; the limit is {limits.text_bytes}", "messages")
    if messages[-1]["role"] != "user":
        raise RefusedError(400, "the last message must be the user's", "messages")
    return messages, urls


def _content(given: Any, where: str) -> tuple[list[dict[str, str]], list[str]]:
    if isinstance(given, str):
        return [{"type": "text", "text": given}], []
    if not isinstance(given, list):
        raise RefusedError(400, f"{where}.content must be a text or a list of parts", where)
    parts, urls = [], []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise RefusedError(400, f"{where}: image_url.url must be a text", where)
            parts.append({"type": "image"})
            urls.append(url)
        else:
            raise RefusedError(400, f"{where}: parts are of the types text and image_url, not {kind!r}", where)
    return parts, urls


def _sampling(data: Mapping[str, Any], limits: Limits) -> Sampling:
    asked = [data[key] for key in ("max_completion_tokens", "max_tokens") if data.get(key) is not None]
    tokens = asked[0] if asked else DEFAULT_TOKENS
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= limits.new_tokens:
        raise RefusedError(400, f"max_tokens is {tokens!r}; it must be 1 to {limits.new_tokens}", "max_tokens")
    stop = data.get("stop")
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise RefusedError(400, "stop must be a text or up to four texts", "stop")
    try:
        return Sampling(
            temperature=_number(data, "temperature", 0.0),
            top_p=_number(data, "top_p", 1.0),
            seed=_seed(data.get("seed")),
            stop=tuple(stop),
            max_new_tokens=tokens,
        )
    except BadInputError as error:
        raise RefusedError(400, str(error)) from error


def _number(data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        raise RefusedError(400, f"{key} must be a number", key)
    return value


def _seed(value: Any) -> int:
    """Any whole number; generators of random numbers take them from 0."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise RefusedError(400, "seed must be a whole number", "seed")
    return value % (1 << 63)


def _wants_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RefusedError(400, "stream_options must be an object", "stream_options")
    return bool(options.get("include_usage"))


def _flag(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value not in (None, True, False):
        raise RefusedError(400, f"{key} must be true or false", key)
    return bool(value)


@dataclass(frozen=True)
class Reply:
    """The fixed parts of one answer's bodies."""

    model: str
    id: str
    created: int

    @staticmethod
    def of(model: str) -> Reply:
        """A reply with a name of its own."""
        return Reply(model, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, text: str, finish: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
            "logprobs": None,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": dict(usage)}

    def chunk(self, delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
        """One piece of a streamed answer."""
        choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last piece of a streamed answer whose client asked for the numbers."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
