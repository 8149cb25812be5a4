"""What a GGUF export costs the bundled model on its frozen questions, teacher-forced, in the real llama.cpp.

Its logits are compared with those of the PyTorch model in float32 (tests/quality.py), which sees the same tokens.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.quality import Judge, Quality
from vlmexport import demo
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_pipeline import export_gguf
from vlmexport.progress import SilentProgress
from vlmexport.quantize.ggml.code_types import codes_type, exact_scheme
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.runtime.llamacpp.export import open_runner
from vlmexport.runtime.llamacpp.prompt import marked_prompt, prompt_builder
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.prompt import load_image


@dataclass(frozen=True)
class _Item:
    """A question with its answer's ids ``[A]``, and the reference's logits ``[A, V]`` for them."""

    image: Path
    question: str
    answer: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Export:
    """Quality of an export; bits per weight of the text file, CPU seconds of making it, KL of every answer token."""

    quality: Quality
    bits: float
    export_cpu_s: float
    kl: NDArray[Any]


class LlamaJudge:
    """A model folder with its frozen questions (about `count` of them), ready to judge exports of it."""

    def __init__(self, folder: Path, count: int | None = None) -> None:
        self.folder = folder
        self.reference = Judge(folder, count)
        self.builder = prompt_builder(folder)
        self.items = self._items(count)
        self._embeddings: dict[tuple[str, int], tuple[NDArray[np.float32], ...]] = {}

    def original(self) -> Quality:
        """PyTorch itself."""
        return self.reference.original()

    def export(self, options: GgufOptions, calibration: CalibrationOptions | None = None) -> Export:
        """Export as `options` say, run every question, throw the files away."""
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = export_gguf(
                str(self.folder), Path(folder) / "gguf", options, calibration=calibration, force=True, verify=False,
                progress=SilentProgress(),
            )  # fmt: skip
            cpu_s = time.process_time() - start
            with open_runner(result.artifact) as runner:
                rows = [self._judge(runner, i, options.mmproj_type) for i in range(len(self.items))]
        kl, right = (np.concatenate([row[i] for row in rows]) for i in range(2))
        whole = [bool(hits.all()) for _, hits in rows]
        return Export(
            Quality(float(kl.mean()), float(right.mean()), float(np.mean(whole))),
            result.plan.bits_per_weight("text"),
            cpu_s,
            kl,
        )

    def _judge(self, runner: LlamaCppRunner, index: int, mmproj_type: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """KL and hits per answer token; a picture goes once through a vision half of each type."""
        item = self.items[index]
        prompt = runner.prompt(marked_prompt(self.builder, item.question, 1, runner.marker), [load_image(item.image)])
        prompt.embeddings = self._embeddings.get((mmproj_type, index))
        got = torch.from_numpy(runner.forced(prompt, item.answer)).double().log_softmax(-1)
        assert prompt.embeddings is not None
        self._embeddings[mmproj_type, index] = prompt.embeddings
        want = item.logits.double().log_softmax(-1)
        kl = (want.exp() * (want - got)).sum(-1)
        return kl.numpy(), (got.argmax(-1) == torch.tensor(item.answer)).numpy()

    def _items(self, count: int | None) -> list[_Item]:
        questions = demo.frozen_questions()
        step = 1 if count is None else max(1, len(questions) // count)
        rows = [
            (ids[1:][mask[1:]].tolist(), logits[:-1][mask[1:]])
            for batch, made in zip(self.reference.batches, self.reference.reference, strict=True)
            for ids, mask, logits in zip(batch.input_ids, batch.answer, made[0], strict=True)
        ]
        chosen = zip(questions[::step], rows, strict=True)
        return [_Item(q.image, q.question, answer, logits) for q, (answer, logits) in chosen]


def coded(algorithm: str, symmetric: bool = True, bits: int = 4) -> GgufOptions:
    """Options that hand the codes of an algorithm over, groups of 32."""
    scheme = exact_scheme(QuantScheme(bits, symmetric, 32, algorithm))
    return GgufOptions(quant=codes_type(scheme), scheme=scheme, imatrix="none")
