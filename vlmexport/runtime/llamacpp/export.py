"""Exports of the ``gguf`` layout: the runner of one, and its answer to a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.runtime.generate import Answer, Timings, collect
from vlmexport.runtime.llamacpp.prompt import marked_prompt, prompt_builder
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.prompt import load_image
from vlmexport.runtime.text import TextStream

if TYPE_CHECKING:
    from vlmexport.manifest import Artifact
    from vlmexport.runtime.sampling import Sampling

TEXT_PART = "decoder"
VISION_PART = "vision_encoder"
SMALLEST_CONTEXT = 256  # llama.cpp rounds up to multiples of it


def open_runner(artifact: Artifact, *, threads: int = 0, context: int = 4096) -> LlamaCppRunner:
    """llama.cpp with the two files of a ``gguf`` export; `SMALLEST_CONTEXT` for who knows what to ``reserve``."""
    text, vision = artifact.part_path(TEXT_PART), artifact.part_path(VISION_PART)
    return LlamaCppRunner(text, vision, threads=threads, context=context)


def answer_gguf(
    artifact: Artifact,
    images: Sequence[Path],
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], None],
    *,
    threads: int = 0,
    trust_remote_code: bool = False,
) -> Answer:
    """Answer `prompt` about `images` by llama.cpp; `on_text` gets the text piece by piece."""
    pictures = [load_image(path) for path in images]
    builder = prompt_builder(artifact.path, trust_remote_code=trust_remote_code)
    with open_runner(artifact, threads=threads, context=SMALLEST_CONTEXT) as runner:
        cut = runner.prompt(marked_prompt(builder, prompt, len(pictures), runner.marker), pictures)
        runner.reserve(len(cut.ids) + sampling.max_new_tokens)
        timings = Timings(load_ms=runner.load_ms)
        stream = TextStream(builder.tokenizer, sampling.stop)
        tokens = collect(runner.generate(cut, sampling, timings), stream, on_text)
        return Answer(stream.text, tokens, len(cut.ids), timings.to_dict())
