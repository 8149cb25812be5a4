"""A tiny checkpoint exported and run in llama.cpp, against the whole model in PyTorch, FP32, fed the same picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_pipeline import export_gguf
from vlmexport.model.load import load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner

ANSWER = (140, 300, 77, 205, 190)
KL_LIMIT = 1e-4

# The PyTorch model's inputs besides the ids, and the ids of a picture's positions, from the picture and their number.
Inputs = Callable[[Image.Image, int], tuple[dict[str, Any], Sequence[int]]]


@dataclass(frozen=True)
class Proof:
    """How far llama.cpp is from PyTorch.

    `embeddings`: relative error of the pictures' rows, in the norm of all of them; `kl`: the mean divergence of the
    logits of `ANSWER` behind every prompt, in nats; `worst`: the largest; `images`: rows that pictures take.
    """

    embeddings: float
    kl: float
    worst: float
    images: int


def export(folder: Path, out: Path, quant: str = "F16", mmproj_type: str = "F16") -> tuple[Path, Path]:
    """Export without a gate; the text file and the mmproj file."""
    options = GgufOptions(quant=quant, mmproj_type=mmproj_type, imatrix="none")
    result = export_gguf(str(folder), out, options, force=True, verify=False, progress=SilentProgress())
    files = sorted(result.artifact.path.glob("*.gguf"), key=lambda file: file.name.startswith("mmproj"))
    return files[0], files[1]


def prove(folder: Path, files: tuple[Path, Path], image: Image.Image, prompts: Sequence[str], inputs: Inputs) -> Proof:
    """Compare `files` with the checkpoint in `folder` on `prompts`, in which ``{image}`` is the picture's place."""
    vlm = load_vlm(str(folder))
    model = vlm.model
    assert model.dtype == torch.float32
    errors, divergences, rows = [], [], 0
    with LlamaCppRunner(*files, threads=1, context=2048, exact=True) as runner:
        for text in prompts:
            prompt = runner.prompt(text.replace("{image}", runner.marker), [image])
            own, ids = inputs(image, prompt.image_tokens)
            sequence = torch.from_numpy(prompt.ids.copy())
            places = sequence == -1
            sequence[places] = torch.tensor(list(ids))
            wanted, logits = _reference(model, sequence, places, own)
            got = torch.from_numpy(runner.image_embeddings(prompt))
            errors.append(float((got - wanted).norm() / wanted.norm()))
            divergences.append(_divergence(logits, torch.from_numpy(runner.forced(prompt, ANSWER))))
            rows = prompt.image_tokens
    kl = torch.cat(divergences)
    return Proof(max(errors), float(kl.mean()), float(kl.max()), rows)


def _reference(
    model: Any, prompt: torch.Tensor, places: torch.Tensor, own: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the decoder at `places` of the prompt, deepstack levels side by side, and the logits of `ANSWER`.

    What is callable among `own` is made from all ids ``[1, tokens]``.
    """
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        levels = kwargs.get("deepstack_visual_embeds") or []
        seen.append(torch.cat([kwargs["inputs_embeds"][0][: len(prompt)][places], *levels], dim=-1))

    ids = torch.cat([prompt, torch.tensor(ANSWER[:-1])])[None]
    own = {name: value(ids) if callable(value) else value for name, value in own.items()}
    handle = model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **own).logits[0]
    handle.remove()
    return seen[0], logits[len(prompt) - 1 :]


def _divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    left, right = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)
