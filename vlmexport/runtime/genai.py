"""An export of the ``genai`` layout, run by onnxruntime-genai itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from vlmexport.errors import ArtifactError, NotPossibleHereError
from vlmexport.model.json_files import read_json_if_there
from vlmexport.runtime.protocol import Array, ModelInputs

PACKAGE = "onnxruntime_genai"


class GenaiModel:
    """A folder as onnxruntime-genai loads it.

    Raises `NotPossibleHereError` when the package is not installed, `ArtifactError` when it refuses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.genai = _package()
        self.image_token_id = int(read_json_if_there(folder / "genai_config.json")["model"]["image_token_id"])
        try:
            self.model: Any = self.genai.Model(str(folder))
        except RuntimeError as error:
            raise ArtifactError(
                f"{folder}: onnxruntime-genai does not load it: {str(error).splitlines()[0]}"
            ) from error

    def prepare(self, prompt: str, *pictures: Path) -> Any:
        """Its own processor's tensors by name for a prompt of the chat template and image files."""
        images = self.genai.Images.open(*map(str, pictures)) if pictures else None
        return self.model.create_multimodal_processor()(prompt, images=images)

    def tensors(self, prompt: ModelInputs) -> Any:
        """The same, of inputs that the model's own processor made for one prompt."""
        named = self.genai.NamedTensors()
        named["input_ids"] = prompt.input_ids.astype(np.int32)
        count = int((prompt.input_ids == self.image_token_id).sum())
        named["num_image_tokens"] = np.array([count], np.int64)
        for name, array in prompt.pixel_inputs.items():
            kind = np.float32 if array.dtype.kind == "f" else np.int64
            named[name] = np.ascontiguousarray(array, kind)
        return named

    def greedy(self, inputs: Any, tokens: int) -> tuple[Array, list[int]]:
        """Logits float32 ``[vocab]`` behind the prompt, and up to `tokens` greedy tokens (fewer where it ends)."""
        length = int(inputs["input_ids"].shape()[-1])
        settings = self.genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=length + tokens, do_sample=False, past_present_share_buffer=True)
        generator = self.genai.Generator(self.model, settings)
        generator.set_inputs(inputs)
        logits = np.asarray(generator.get_logits(), np.float32).reshape(-1).copy()
        made: list[int] = []
        while len(made) < tokens and not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return logits, made


def _package() -> Any:
    """The package, which sends nothing home from here."""
    try:
        genai: Any = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise NotPossibleHereError("onnxruntime-genai is not installed; pip install onnxruntime-genai") from error
    if hasattr(genai, "disable_telemetry_events"):
        genai.disable_telemetry_events()
    return genai
