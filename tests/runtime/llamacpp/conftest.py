"""The bundled model as GGUF files in F32, and an export of them, hand-built: it owes nothing to the exporter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from tools.train_fixture.gguf_files import write_mmproj, write_text
from vlmexport.demo import FrozenQuestion, frozen_questions, model_dir
from vlmexport.manifest import Artifact, Manifest, PartFile, write_manifest
from vlmexport.model.load import load_vlm
from vlmexport.runtime.llamacpp.chunks import LlamaPrompt
from vlmexport.runtime.llamacpp.prompt import marked_prompt
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.prompt import PromptBuilder


class Files(NamedTuple):
    text: Path
    mmproj: Path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("gguf")
    return Files(write_text(model_dir(), folder / "text.gguf"), write_mmproj(model_dir(), folder / "mmproj.gguf"))


@pytest.fixture(scope="session")
def export(gguf: Files, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_export(gguf, tmp_path_factory.mktemp("export"))


def make_export(gguf: Files, folder: Path, model: Path | None = None) -> Artifact:
    """An export folder of the ``gguf`` layout around two files."""
    for file in (model or model_dir()).iterdir():
        if file.suffix in {".json", ".jinja"} and "index" not in file.name:
            shutil.copy(file, folder)
    shutil.copy(gguf.text, folder)
    shutil.copy(gguf.mmproj, folder)
    parts = {"decoder": PartFile(gguf.text.name, (), ()), "vision_encoder": PartFile(gguf.mmproj.name, (), ())}
    source = {"model": str(model or "demo")}
    return write_manifest(folder, Manifest("gguf", "llamacpp", {}, source, {}, {}, parts, (), ()))


@pytest.fixture(scope="session")
def runner(gguf: Files) -> Iterator[LlamaCppRunner]:
    with LlamaCppRunner(*gguf, threads=1, context=1024, exact=True) as made:
        yield made


@pytest.fixture(scope="session")
def builder() -> PromptBuilder:
    return PromptBuilder(model_dir())


class Reference:
    """The bundled model in transformers, in float32."""

    def __init__(self, builder: PromptBuilder) -> None:
        self.builder = builder
        self.model: Any = load_vlm("demo").model
        self.model.float()

    def inputs(self, pictures: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
        made = self.builder.build(pictures, question)
        return {"input_ids": torch.tensor(made.input_ids), **{k: torch.tensor(v) for k, v in made.pixel_inputs.items()}}

    def ids(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        ids = inputs["input_ids"][0].numpy()
        return np.where(ids == self.model.config.image_token_id, -1, ids)

    @torch.no_grad()
    def features(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        found = self.model.get_image_features(**{k: v for k, v in inputs.items() if k != "input_ids"})
        found = getattr(found, "pooler_output", found)
        rows = found if isinstance(found, list | tuple) else list(found)
        return torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]).numpy()

    @torch.no_grad()
    def greedy(self, inputs: dict[str, torch.Tensor], tokens: int = 48) -> list[int]:
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor], answer: list[int]) -> np.ndarray:
        """Logits ``[prompt + answer, vocab]``."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
        return self.model(**{**inputs, "input_ids": ids}).logits[0].numpy()


@pytest.fixture(scope="session")
def reference(builder: PromptBuilder) -> Reference:
    return Reference(builder)


def asked(question: FrozenQuestion) -> list[Image.Image]:
    with Image.open(question.image) as stored:
        return [stored.convert("RGB")]


def some_questions(count: int) -> list[FrozenQuestion]:
    every = frozen_questions()
    return every[:: len(every) // count][:count]


def prompt_of(
    runner: LlamaCppRunner, builder: PromptBuilder, pictures: list[Image.Image], question: str
) -> LlamaPrompt:
    return runner.prompt(marked_prompt(builder, question, len(pictures), runner.marker), pictures)
