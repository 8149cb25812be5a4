"""Answers: the generation loop over any `Runner`, for one prompt with streamed text or for a padded batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.engines import static_capacity
from vlmexport.errors import BadInputError
from vlmexport.runtime.decoder_inputs import encoded_pictures, token_inputs, with_features
from vlmexport.runtime.protocol import ModelInputs, Runner
from vlmexport.runtime.rules import AnswerRules, answer_rules
from vlmexport.runtime.sampling import Sampling, choose
from vlmexport.runtime.text import TextStream
from vlmexport.runtime.text_only import require_text

if TYPE_CHECKING:
    from pathlib import Path

    from vlmexport.manifest import Artifact
    from vlmexport.runtime.prompt import PromptBuilder
    from vlmexport.runtime.video import Video

GREEDY = Sampling()
FREE = AnswerRules()
GGUF_LAYOUT = "gguf"


@dataclass
class Timings:
    """Where the time of one generation went, in milliseconds.

    `load_ms` opens the graphs, `image_ms` is everything from pixels to image features, `prefill_ms` embedding, merging
    and prefill; `ttft_ms` is `image_ms` + `prefill_ms`. `decode_ms` has one entry per later token.
    """

    load_ms: float = 0.0
    image_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Time to the first token, without loading."""
        return self.image_ms + self.prefill_ms

    def to_dict(self) -> dict[str, float]:
        """Summary as JSON data; ``decode_tok_s`` is 0 when nothing was decoded."""
        total = sum(self.decode_ms)
        return {
            "load_ms": self.load_ms,
            "image_ms": self.image_ms,
            "prefill_ms": self.prefill_ms,
            "ttft_ms": self.ttft_ms,
            "decode_ms": total,
            "decode_tok_s": 1000 * len(self.decode_ms) / total if total else 0.0,
        }


@dataclass(frozen=True)
class Generation:
    """Token ids per prompt, without the end token, and the timings of the batch."""

    tokens: tuple[tuple[int, ...], ...]
    timings: Timings


@dataclass(frozen=True)
class Answer:
    """One answered prompt."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    timings: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The answer as ``run --json`` writes it."""
        return {**asdict(self), "token_ids": list(self.token_ids)}


def answer(
    artifact: Artifact,
    images: Sequence[Path],
    prompt: str,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], None] = lambda text: None,
    *,
    threads: int = 0,
    video: Video | None = None,
    trust_remote_code: bool = False,
) -> Answer:
    """Answer `prompt` about `images` from the exported files alone; `on_text` gets the text piece by piece.

    `video` stands between the images and the text. `trust_remote_code` lets a processor run code that came with the
    model. In a static cache the answer ends where the cache does;
    `BadInputError` for a prompt that does not fit, and for a video where the export takes none.
    """
    require_text(artifact)
    if artifact.manifest.layout == GGUF_LAYOUT:
        from vlmexport.runtime.llamacpp.export import answer_gguf

        if video is not None:
            raise BadInputError(f"{artifact.path}: GGUF exports take pictures, no videos; give pictures with --image")
        return answer_gguf(
            artifact, images, prompt, sampling, on_text, threads=threads, trust_remote_code=trust_remote_code
        )
    from vlmexport.runtime.ort import OnnxRunner
    from vlmexport.runtime.prompt import PromptBuilder

    builder = PromptBuilder(artifact.path, trust_remote_code=trust_remote_code)
    inputs = _inputs(artifact, builder, images, video, prompt)
    runner = OnnxRunner(artifact, threads=threads)
    timings = Timings(load_ms=1000 * runner.load())
    stream = TextStream(builder.tokenizer, sampling.stop)
    sampling = within(sampling, static_capacity(artifact.manifest.model), inputs.input_ids.shape[1])
    rules = answer_rules(artifact.path, runner.merge_spec)
    tokens = collect(_until_end(generate_steps(runner, [inputs], sampling, timings, rules=rules)), stream, on_text)
    return Answer(stream.text, tokens, int(inputs.input_ids.shape[1]), timings.to_dict())


def _inputs(
    artifact: Artifact, builder: PromptBuilder, images: Sequence[Path], video: Video | None, prompt: str
) -> ModelInputs:
    if video is None:
        return builder.build(list(images), prompt)
    from vlmexport.runtime.video_prompt import build_video_prompt, require_video_inputs

    inputs = build_video_prompt(builder, list(images), video, prompt)
    require_video_inputs(artifact, inputs)
    return inputs


def within(sampling: Sampling, capacity: int | None, prompt_tokens: int) -> Sampling:
    """`sampling` with no more new tokens than a cache of `capacity` tokens (None: any number) has room for.

    One is always left: a prompt that fills the cache has logits for it, and a longer prompt is the decoder's to refuse.
    """
    if capacity is None:
        return sampling
    room = max(capacity - prompt_tokens, 1)
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def collect(tokens: Iterable[int], stream: TextStream, on_text: Callable[[str], None]) -> tuple[int, ...]:
    """Show an answer's tokens as text while they come, until they end or a stop text does; what was taken of them."""
    taken: list[int] = []
    for token in tokens:
        taken.append(token)
        _emit(on_text, stream.push(token))
        if stream.stopped:
            break
    _emit(on_text, stream.finish())
    return tuple(taken)


def _until_end(steps: Iterator[list[int | None]]) -> Iterator[int]:
    for (token,) in steps:
        if token is None:
            return
        yield token


def _emit(on_text: Callable[[str], None], text: str) -> None:
    if text:
        on_text(text)


def generate_ids(
    runner: Runner,
    batch: Sequence[ModelInputs],
    sampling: Sampling = GREEDY,
    *,
    end_tokens: Collection[int] | None = None,
) -> Generation:
    """Generate for a batch of prompts at once, right-padded and decoded ragged; stop texts are not looked at.

    `end_tokens` replaces the runner's own end tokens; empty means that every answer has ``max_new_tokens`` tokens.
    """
    timings = Timings()
    steps = list(generate_steps(runner, batch, sampling, timings, end_tokens=end_tokens))
    rows = zip(*steps, strict=True)
    return Generation(tuple(tuple(t for t in row if t is not None) for row in rows), timings)


def generate_steps(
    runner: Runner,
    batch: Sequence[ModelInputs],
    sampling: Sampling,
    timings: Timings,
    *,
    end_tokens: Collection[int] | None = None,
    rules: AnswerRules = FREE,
) -> Iterator[list[int | None]]:
    """Yield one step at a time: the next token of each row, None once the row has ended.

    `rules` are what the model's generation_config asks of answers. Ends after ``sampling.max_new_tokens`` steps or when
    all rows have ended; fills `timings` as it goes.
    """
    if not batch:
        raise BadInputError("there is no prompt to generate from")
    end = list(runner.eos_token_ids if end_tokens is None else end_tokens)
    generator = sampling.generator()
    ended = np.zeros(len(batch), dtype=bool)
    logits, cache = _start(runner, batch, sampling.max_new_tokens, timings)
    longest, answers = sampling.max_new_tokens, [list[int]() for _ in batch]
    for step in range(sampling.max_new_tokens):
        rows = [rules.applied(row[-1], said, longest) for row, said in zip(logits, answers, strict=True)]
        chosen = [choose(row, sampling, generator) for row in rows]
        for said, token in zip(answers, chosen, strict=True):
            said.append(token)
        ended |= np.isin(chosen, end)
        yield [None if done else token for token, done in zip(chosen, ended, strict=True)]
        if ended.all() or step + 1 == sampling.max_new_tokens:
            return
        start = time.perf_counter()
        logits = token_inputs(runner, np.array(chosen, np.int64)[:, None]).decode(runner, cache)
        timings.decode_ms.append(1000 * (time.perf_counter() - start))


def _start(runner: Runner, batch: Sequence[ModelInputs], reserve: int, timings: Timings) -> tuple[NDArray[Any], Any]:
    """Encode the images, merge and prefill."""
    start = time.perf_counter()
    features = encoded_pictures(runner, batch)
    encoded = time.perf_counter()
    inputs, mask = with_features(runner, batch, features)
    logits, cache = inputs.prefill(runner, mask, 1, reserve=reserve)
    timings.image_ms = 1000 * (encoded - start)
    timings.prefill_ms = 1000 * (time.perf_counter() - encoded)
    return logits, cache
