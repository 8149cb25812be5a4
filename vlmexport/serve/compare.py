"""The original in PyTorch beside the export: its answer, and how far every part of the export is from it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.manifest import Artifact
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve.engine import Engine, Messages, OnnxEngine, Spoken, positions
from vlmexport.verify.metrics import kl_per_token
from vlmexport.verify.reference import Reference, load_reference, original_source

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PartDifference:
    """How far one part of the export is from PyTorch on this very chat: `value` of the kind `metric`.

    None where the two cannot be compared: another shape, or numbers that are not finite.
    """

    part: str
    metric: str
    value: float | None


class Original:
    """The model that an export was made from, in FP32; loaded when it is first asked."""

    def __init__(self, artifact: Artifact, model: str | None = None, *, trust_remote_code: bool = False) -> None:
        self.source, self._lora = original_source(artifact.manifest, model, None)
        self._trust = trust_remote_code
        self._engine: OnnxEngine | None = None

    def why_not(self) -> str:
        """Why there is nothing to compare with; empty where there is. The model is loaded by this."""
        try:
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
            found.append(PartDifference("vision encoder and projector", "relative", _relative(*features)))
        rows = [e.runner.embed(i.input_ids) for e, i in ((engine, ours), (original, theirs))]
        found.append(PartDifference("token embedding", "relative", _relative(*rows)))
        logits = []
        for side, item in ((engine, ours), (original, theirs)):
            merged, mask = merged_inputs(side.runner, [item])
            logits.append(merged.prefill(side.runner, mask, 1)[0][0])
        found.append(
            PartDifference("decoder, next token", "KL", _finite(float(kl_per_token(logits[1], logits[0]).mean())))
        )
        return found

    def _open(self) -> OnnxEngine:
        if self._engine is None:
            reference: Reference = load_reference(self.source, lora=self._lora, trust_remote_code=self._trust)
            folder = reference.vlm.path
            self._engine = OnnxEngine(
                reference.runner, PromptBuilder(folder, trust_remote_code=self._trust), positions(folder)
            )
        return self._engine


def _relative(ours: Any, theirs: Any) -> float | None:
    """Largest difference over the largest value of the original; None for another shape."""
    if ours.shape != theirs.shape:
        return None
    return _finite(float(np.abs(ours.astype(np.float64) - theirs).max() / max(float(np.abs(theirs).max()), 1e-12)))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
