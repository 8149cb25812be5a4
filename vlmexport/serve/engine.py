"""The export behind the server: opened once, one answer at a time, by ONNX Runtime or llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmexport.engines import static_capacity
from vlmexport.errors import BadInputError, VlmExportError
from vlmexport.manifest import Artifact
from vlmexport.runtime.generate import FREE, GGUF_LAYOUT, Timings, generate_steps
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.rules import AnswerRules, answer_rules
from vlmexport.runtime.sampling import Sampling
from vlmexport.runtime.text import TextStream
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmexport.runtime.protocol import ModelInputs, Runner

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Spoken:
    """One finished answer: `finish` is ``stop`` or ``length``."""

    text: str
    finish: str
    prompt_tokens: int
    answer_tokens: int
    timings: dict[str, float]

    @property
    def usage(self) -> dict[str, int]:
        """Token counts as OpenAI names them."""
        total = self.prompt_tokens + self.answer_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens, "total_tokens": total}


class Engine(Protocol):
    """What answers a chat."""

    def speak(
        self, messages: Messages, pictures: Sequence[Image], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Spoken:
        """Answer; `on_text` gets the text as it comes. Raises `RefusedError` for a chat that the model cannot take."""


class OnnxEngine:
    """An export of ONNX graphs, or any other `Runner` with its processor."""

    def __init__(
        self,
        runner: Runner,
        builder: PromptBuilder,
        capacity: int | None,
        rules: AnswerRules = FREE,
        limits: Limits | None = None,
    ) -> None:
        self.runner, self.builder, self.rules = runner, builder, rules
        self.capacity = (limits or Limits()).prompt_tokens if capacity is None else capacity

    def speak(
        self, messages: Messages, pictures: Sequence[Image], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Spoken:
        """See `Engine.speak`."""
        inputs = self.inputs(messages, pictures)
        count = int(inputs.input_ids.shape[1])
        fitted = _fitted(sampling, count, self.capacity)
        timings = Timings()
        steps = generate_steps(self.runner, [inputs], fitted, timings, rules=self.rules)
        tokens = _tokens(steps, self.rules, fitted.max_new_tokens)
        return _spoken(tokens, TextStream(self.builder.tokenizer, sampling.stop), on_text, count, timings)

    def inputs(self, messages: Messages, pictures: Sequence[Image]) -> ModelInputs:
        """The chat as the model takes it. Raises `RefusedError` where its template or processor refuses it."""
        from jinja2 import TemplateError

        try:
            if getattr(self.builder.processor, "chat_template", None):
                return self.builder.encode(self.builder.render(messages), list(pictures))
            return self.builder.build(list(pictures), _only_text(messages))
        except (BadInputError, TemplateError, ValueError, TypeError, IndexError) as error:
            raise RefusedError(
                400, f"the model's chat template or processor refuses this: {error}", "messages"
            ) from error


class GgufEngine:
    """A GGUF export in llama.cpp."""

    def __init__(self, artifact: Artifact, threads: int, limits: Limits, *, trust_remote_code: bool = False) -> None:
        from vlmexport.runtime.llamacpp.export import SMALLEST_CONTEXT, open_runner
        from vlmexport.runtime.llamacpp.prompt import prompt_builder

        self.runner = open_runner(artifact, threads=threads, context=SMALLEST_CONTEXT)
        self.builder = prompt_builder(artifact.path, trust_remote_code=trust_remote_code)
        self.capacity = positions(artifact.path, trust_remote_code=trust_remote_code) or limits.prompt_tokens

    def speak(
        self, messages: Messages, pictures: Sequence[Image], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Spoken:
        """See `Engine.speak`."""
        from vlmexport.runtime.llamacpp.prompt import marked_prompt

        try:
            text = marked_prompt(self.builder, messages, len(pictures), self.runner.marker)
            cut = self.runner.prompt(text, list(pictures))
        except BadInputError as error:
            raise RefusedError(400, str(error), "messages") from error
        count = len(cut.ids)
        fitted = _fitted(sampling, count, self.capacity)
        self.runner.reserve(count + fitted.max_new_tokens)
        timings = Timings()
        tokens = self.runner.generate(cut, fitted, timings)
        return _spoken(
            _ended(tokens, fitted), TextStream(self.builder.tokenizer, sampling.stop), on_text, count, timings
        )


def open_engine(artifact: Artifact, limits: Limits, threads: int = 0, *, trust_remote_code: bool = False) -> Engine:
    """The engine of an export, its graphs open; `trust_remote_code` lets its processor run code of the model's."""
    if artifact.manifest.layout == GGUF_LAYOUT:
        return GgufEngine(artifact, threads, limits, trust_remote_code=trust_remote_code)
    from vlmexport.runtime.ort import OnnxRunner

    runner = OnnxRunner(artifact, threads=threads)
    runner.load()
    trust = trust_remote_code
    capacity = static_capacity(artifact.manifest.model) or positions(artifact.path, trust_remote_code=trust)
    rules = answer_rules(artifact.path, runner.merge_spec)
    builder = PromptBuilder(artifact.path, trust_remote_code=trust_remote_code)
    return OnnxEngine(runner, builder, capacity, rules, limits)


def positions(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """How many positions the model in `folder` has, by its config; None where that does not say."""
    from transformers import AutoConfig

    load: Any = AutoConfig.from_pretrained
    try:
        config = load(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):  # a type that this transformers does not know without its own code
        return None
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def _fitted(sampling: Sampling, prompt_tokens: int, capacity: int) -> Sampling:
    if prompt_tokens >= capacity:
        raise RefusedError(400, f"the prompt has {prompt_tokens} tokens; there is room for {capacity}", "messages")
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, capacity - prompt_tokens))


def _tokens(steps: Iterator[list[int | None]], rules: AnswerRules, longest: int) -> Iterator[int | None]:
    """The tokens of an answer, and None where the model ended it.

    An end that `rules` force at the longest length is none of the model's: the answer was cut there.
    """
    for count, (token,) in enumerate(steps, start=1):
        if token is None and rules.last is not None and count == longest:
            return
        yield token


def _ended(tokens: Iterator[int], sampling: Sampling) -> Iterator[int | None]:
    """`tokens`, and None where the model ended the answer itself."""
    count = 0
    for token in tokens:
        count += 1
        yield token
    if count < sampling.max_new_tokens:
        yield None


def _spoken(
    tokens: Iterator[int | None], stream: TextStream, on_text: Callable[[str], None], count: int, timings: Timings
) -> Spoken:
    taken, finish = 0, "length"
    try:
        for token in tokens:
            if token is None:
                finish = "stop"
                break
            taken += 1
            if new := stream.push(token):
                on_text(new)
            if stream.stopped:
                finish = "stop"
                break
    except VlmExportError as error:
        raise RefusedError(500, f"the export does not answer: {error}") from error
    if rest := stream.finish():
        on_text(rest)
    return Spoken(stream.text, finish, count, taken, timings.to_dict())


def _only_text(messages: Messages) -> str:
    """The texts of a chat for a model without a chat template."""
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
