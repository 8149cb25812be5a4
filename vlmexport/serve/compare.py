"""The original in PyTorch beside the export: its answer, and how far every part of the export is from it here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmexport.bench.memory import available_memory
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.manifest import Artifact
from vlmexport.model.checkpoint import read_checkpoint
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.model.source import resolve_source
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.rules import answer_rules
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve.engine import Engine, Messages, OnnxEngine, Spoken, positions
from vlmexport.serve.limits import Limits
from vlmexport.verify.metrics import kl_per_token
from vlmexport.verify.reference import Reference, load_reference, original_source

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PartDifference:
    """How far one part of the export is from PyTorch on this very chat: `value` of the kind `metric`.

    None where the two cannot be compared; `note` says why: another shape, or numbers that are not finite.
    """

    part: str
    metric: str
    value: float | None
    note: str = ""


class Original:
    """The model that an export was made from, in FP32; loaded when it is first asked."""

    def __init__(
        self,
        artifact: Artifact,
        model: str | None = None,
        limits: Limits | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.source, self._lora = original_source(artifact.manifest, model, None)
        self._trust = trust_remote_code
        self._limits = limits or Limits()
        self._engine: OnnxEngine | None = None

    def why_not(self) -> str:
        """Why there is nothing to compare with; empty where there is. The model is loaded by this, if it fits."""
        try:
            if self._engine is None and (why := too_large(self._weight_files())):
                return why
            self._open()
        except (BadInputError, NotPossibleHereError) as error:
            return str(error)
        return ""

    def speak(
        self, messages: Messages, pictures: Sequence[Image], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Spoken:
        """See `Engine.speak`."""
        return self._open().speak(messages, pictures, sampling, on_text)

    def differences(self, engine: Engine, messages: Messages, pictures: Sequence[Image]) -> list[PartDifference]:
        """Part by part on one chat; empty for a runtime that shows its answers alone (llama.cpp)."""
        if not isinstance(engine, OnnxEngine):
            return []
        original = self._open()
        ours, theirs = engine.inputs(messages, pictures), original.inputs(messages, pictures)
        found = []
        if ours.pixel_inputs:
            features = [e.runner.image_features(i.pixel_inputs) for e, i in ((engine, ours), (original, theirs))]
            found.append(_compared("vision encoder and projector", "relative", _relative, *features))
        rows = [e.runner.embed(i.input_ids) for e, i in ((engine, ours), (original, theirs))]
        found.append(_compared("token embedding", "relative", _relative, *rows))
        logits = []
        for side, item in ((engine, ours), (original, theirs)):
            merged, mask = merged_inputs(side.runner, [item])
            logits.append(merged.prefill(side.runner, mask, 1)[0][0])
        found.append(_compared("decoder, next token", "KL", _divergence, *logits))
        return found

    def _weight_files(self) -> tuple[Path, ...]:
        folder = resolve_source(self.source, trust_remote_code=self._trust)
        return read_checkpoint(folder, trust_remote_code=self._trust).weight_files

    def _open(self) -> OnnxEngine:
        if self._engine is None:
            reference: Reference = load_reference(self.source, lora=self._lora, trust_remote_code=self._trust)
            folder = reference.vlm.path
            runner, builder = reference.runner, PromptBuilder(folder, trust_remote_code=self._trust)
            rules = answer_rules(folder, runner.merge_spec)
            self._engine = OnnxEngine(
                runner, builder, positions(folder, trust_remote_code=self._trust), rules, self._limits
            )
        return self._engine


def too_large(files: Sequence[Path]) -> str:
    """Why a model with these weight files is not loaded in FP32 here; empty where it fits or nothing is known.

    The codes of a quantized checkpoint count as they are stored: such a model is larger than this says.
    """
    stored, free = StoredTensors(files), available_memory()
    needed = 4 * sum(math.prod(stored.shape(name)) for name in stored)
    if free is None or needed <= free:
        return ""
    return (
        f"the original is not loaded: in FP32 it needs {needed / 1e9:.3g} GB of memory and {free / 1e9:.3g} GB are "
        "available here; start the server with --no-compare, or where there is more"
    )


def _compared(part: str, metric: str, measure: Callable[[Any, Any], float], ours: Any, theirs: Any) -> PartDifference:
    if ours.shape != theirs.shape:
        return PartDifference(part, metric, None, "another shape")
    value = measure(ours, theirs)
    return (
        PartDifference(part, metric, value) if np.isfinite(value) else PartDifference(part, metric, None, "not finite")
    )


def _relative(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value of the original."""
    return float(np.abs(ours.astype(np.float64) - theirs).max() / max(float(np.abs(theirs).max()), 1e-12))


def _divergence(ours: Any, theirs: Any) -> float:
    """KL of our next token from the original's, in nats."""
    return float(kl_per_token(theirs, ours).mean())
