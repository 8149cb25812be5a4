"""The proof of one family: split, lowered to ONNX, and compared with PyTorch on shapes that were not traced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.zoo.models import make_zoo, zoo_examples
from vlmexport.lower import emitter
from vlmexport.manifest import Artifact
from vlmexport.model.load import VLM, load_vlm
from vlmexport.package import package
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.progress import SilentProgress
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import merge
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role, Split
from vlmexport.target import load_target

STEPS = 16
LOWEST = 1e38
FLOATS = OnnxOptions(scheme=None, encoder_dtype="fp32", decoder_dtype="fp32")


@dataclass(frozen=True)
class Zooed:
    """A family's tiny checkpoint, loaded and split; `examples` are inputs of the whole model."""

    vlm: VLM
    split: Split
    examples: tuple[dict[str, torch.Tensor], ...]


def take_apart(family: str, folder: Path) -> Zooed:
    """Make the checkpoint in `folder`, load it and split it."""
    vlm = load_vlm(str(make_zoo(family, folder)))
    examples = zoo_examples(family, vlm.model, vlm.facts.image_token_id)
    return Zooed(vlm, split_model(vlm, examples), examples)


def export(zooed: Zooed, options: OnnxOptions, folder: Path) -> Artifact:
    """The export of a split model, without the gate (which asks for a processor)."""
    vlm, split, target = zooed.vlm, zooed.split, load_target(options.target)
    plan = plan_export(vlm, split, target, options)
    weights = DecoderWeights(weight_names(vlm.model, split.parts[Role.DECODER].module), plan.schemes)
    folder.mkdir(parents=True, exist_ok=True)
    emitted = emitter("onnx", options.layout)(vlm, split, plan, target, weights, folder, SilentProgress())
    return package(vlm, split, plan, target, emitted, folder)


def largest_differences(zooed: Zooed, artifact: Artifact) -> dict[str, float]:
    """Relative differences between ONNX Runtime and PyTorch, by part.

    The image features of every example, and logits through a prefill of the last example and `STEPS` decode steps on
    PyTorch's own tokens; only the first example was traced.
    """
    ours, theirs = OnnxRunner(artifact, threads=1), TorchRunner(zooed.vlm, zooed.split)
    found: dict[str, float] = {}
    for index, example in enumerate(zooed.examples):
        pixels = {n: t.numpy() for n, t in example.items() if n not in ("input_ids", "attention_mask")}
        wanted = theirs.image_features(pixels)
        found[f"features[{index}]"] = relative(ours.image_features(pixels), wanted)
    example = zooed.examples[-1]
    ids = example["input_ids"].numpy()
    embeds = merge(zooed.split.merge, theirs.embed(ids), ids, wanted)
    with torch.no_grad():
        whole = zooed.vlm.model(**example).logits[0].numpy()
    mask = np.ones(ids.shape, np.int64)
    reference, cache = theirs.prefill(embeds, mask, 0)
    found["whole model"] = relative(reference[0], whole)
    logits, past = ours.prefill(embeds, mask, 0)
    found["prefill"] = relative(logits, reference)
    worst = 0.0
    for _ in range(STEPS):
        token = theirs.embed(reference[:, -1:].argmax(-1).astype(np.int64))
        reference, logits = theirs.decode(token, cache), ours.decode(token, past)
        worst = max(worst, relative(logits, reference))
    found["decode"] = worst
    return found


def relative(got: Any, wanted: Any) -> float:
    """Largest difference over the largest wanted value; inf for another shape.

    What a model sets to the lowest number (logits of tokens that it never writes) must be that, and is no measure.
    """
    if got.shape != wanted.shape:
        return float("inf")
    measured = np.where(wanted > -LOWEST, wanted, 0)
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(measured).max())
