"""Does onnxruntime-genai load an export of the ``genai`` layout and give what its graphs give alone?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmexport.errors import NotPossibleHereError
from vlmexport.genai_options import GENAI_LAYOUT
from vlmexport.manifest import Artifact
from vlmexport.model.videos import VIDEO_PIXELS
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.genai import GenaiModel
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs, Runner
from vlmexport.verify import metrics
from vlmexport.verify.gates import Gate, NotRunError
from vlmexport.verify.parts import Prompt

_TOKENS = 16
# Two runs of one graph differ by the order of their sums.
_LOGITS = 1e-2
# Products with codes round activations to 8 bits, and a picture encoded alone differs from one among others in the last
# bit: some activations are rounded the other way. Logits are judged by their KL then.
_LOGITS_OF_CODES = 5e-2
_MERGE = 1e-6


def check_genai(gate: Gate, artifact: Artifact, prompts: Sequence[Prompt], runner: Runner, kl: float) -> None:
    """Judge an export of the ``genai`` layout on each of `prompts` without videos; others have no such checks.

    ``embed_tokens/merge``: the merge in the embedding graph is the one that `runner` does beside it.
    ``model/genai``: logits behind the prompt, and 16 greedy tokens, of onnxruntime-genai against `runner`; not run
    where the package is missing. Logits of quantized weights may differ by `kl`.
    """
    if artifact.manifest.layout != GENAI_LAYOUT:
        return
    if not isinstance(runner, OnnxRunner):
        raise TypeError(f"an export of this layout is run by OnnxRunner, not {type(runner).__name__}")
    found: list[GenaiModel] = []
    for prompt in (prompt for prompt in prompts if VIDEO_PIXELS not in prompt.exported.pixel_inputs):
        inputs, name = prompt.exported, f"embed_tokens/merge[{prompt.name}]"
        with gate.guard(name, "embed_tokens", "lowering"):
            wanted = merged_inputs(runner, [inputs])[0].embeds
            rows = runner.image_features(inputs.pixel_inputs) if inputs.pixel_inputs else None
            gate.close(name, "embed_tokens", "lowering", wanted, runner.embed(inputs.input_ids, rows), _MERGE)
        name = f"model/genai[{prompt.name}]"
        with gate.guard(name, "model", "lowering"):
            try:
                found = found or [GenaiModel(artifact.path)]
            except NotPossibleHereError as error:
                raise NotRunError(str(error)) from error
            _compare(gate, name, found[0], runner, inputs, kl if artifact.manifest.quantized else None)


def _compare(
    gate: Gate, name: str, genai: GenaiModel, runner: OnnxRunner, inputs: ModelInputs, kl: float | None
) -> None:
    logits, tokens = genai.greedy(genai.tensors(inputs), _TOKENS)
    merged = merged_inputs(runner, [inputs])[0]
    own, cache = merged.prefill(runner, reserve=_TOKENS)
    if kl is None:
        gate.close(name, "model", "lowering", own[0, -1], logits, _LOGITS)
    elif fault := metrics.output_fault(own[0, -1], logits):
        gate.fail(name, "model", "lowering", fault)
    else:
        gate.at_most(name, "model", "lowering", metrics.mean_kl(own[0, -1:], logits[None]), kl, "kl")
    largest = 0.0  # how far each of its tokens is below the best one here, after the same tokens
    for token in tokens:
        row = own[0, -1]
        largest = max(largest, float((row.max() - row[token]) / np.abs(row).max()))
        own = runner.decode(runner.embed(np.array([[token]])), cache)
    gate.at_most(
        f"{name}:greedy", "model", "lowering", largest, _LOGITS if kl is None else _LOGITS_OF_CODES, "below best"
    )
