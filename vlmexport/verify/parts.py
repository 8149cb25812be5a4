"""The parts before the decoder, each judged on its own: every part of the export gets the reference's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmexport.model.videos import PIXELS, VIDEO_PIXELS, as_pictures, has_tiles
from vlmexport.runtime.decoder_inputs import DecoderInputs, encoded_pictures, merged_inputs
from vlmexport.runtime.protocol import Array, ModelInputs, Runner, VisionFeatures, named_features
from vlmexport.target import ParityLimits
from vlmexport.verify import metrics
from vlmexport.verify.gates import Gate

_FLOAT16_ROUNDING = 1.001 * 2.0**-11  # half a step, and what the rounding of a product in float32 adds to it
_EMBEDDING_ROWS = 2048


@dataclass(frozen=True)
class Prompt:
    """A probe after the processor: `reference` from the model's own, `exported` from the export's files."""

    name: str
    exported: ModelInputs
    reference: ModelInputs | None


def check_processor(gate: Gate, prompts: Sequence[Prompt]) -> None:
    """``processor/prompt_ids`` and ``processor/pixels``: the export's files make the very same inputs."""
    names = (("processor/prompt_ids", "prompts that differ <="), ("processor/pixels", "abs <="))
    pairs = [(p.name, p.reference, p.exported) for p in prompts if p.reference is not None]
    if not pairs:
        for name, metric in names:
            gate.not_run(name, "processor", "lowering", "the original model could not be loaded", metric)
        return
    differ = [name for name, wanted, found in pairs if not np.array_equal(wanted.input_ids, found.input_ids)]
    gate.verdict(
        "processor/prompt_ids", "processor", "lowering", [f"{n}: other token ids" for n in differ], "differing"
    )
    faults = [f"{n}: {fault}" for n, a, b in pairs if (fault := _pixel_fault(a.pixel_inputs, b.pixel_inputs))]
    gate.verdict("processor/pixels", "processor", "lowering", faults, "differing")


def check_vision(
    gate: Gate, prompts: Sequence[Prompt], exported: Runner, reference: Runner, limits: ParityLimits
) -> None:
    """``vision_encoder/features[probe]`` and ``projector/features[probe]`` for every prompt with images.

    `reference` runs the weights as the export stores them, so that this is the lowering alone. The projector of the
    export gets the reference's vision features, so that its error is its own.
    """
    for prompt in prompts:
        inputs = prompt.reference or prompt.exported
        if not inputs.pixel_inputs:
            continue
        pixels = _pictures(reference, inputs)
        wanted = reference.vision(pixels)
        name = f"vision_encoder/features[{prompt.name}]"
        with gate.guard(name, "vision_encoder", "lowering"):
            found = exported.vision(pixels)
            close_features(gate, name, "vision_encoder", (wanted, found), limits.vision_rel)
        name = f"projector/features[{prompt.name}]"
        with gate.guard(name, "projector", "lowering"):
            features = reference.project(wanted)
            gate.close(name, "projector", "lowering", features, exported.project(wanted), limits.projector_rel)


def check_image_features(
    gate: Gate, prompts: Sequence[Prompt], exported: Runner, reference: Runner, limits: ParityLimits
) -> None:
    """``vision_encoder/image_features[probe]`` for exports whose vision encoder holds the projector.

    Features of the type float16 are allowed one rounding.
    """
    for prompt in prompts:
        inputs = prompt.reference or prompt.exported
        if not inputs.pixel_inputs:
            continue
        name = f"vision_encoder/image_features[{prompt.name}]"
        with gate.guard(name, "vision_encoder", "lowering"):
            found = encoded_pictures(exported, [inputs])[0]
            limit = limits.vision_rel + limits.projector_rel
            limit += _FLOAT16_ROUNDING if found.dtype == np.float16 else 0.0
            wanted = encoded_pictures(reference, [inputs])[0]
            gate.close(name, "vision_encoder", "lowering", wanted, found, limit)


def close_features(
    gate: Gate, name: str, part: str, features: tuple[VisionFeatures, VisionFeatures], limit: float
) -> None:
    """Judge each tensor of the second of `features` by the first; further tensors are ``...:<tensor>`` of `name`."""
    wanted, found = (named_features(one) for one in features)
    for index, (tensor, array) in enumerate(wanted.items()):
        gate.close(f"{name}:{tensor}" if index else name, part, "lowering", array, found.get(tensor), limit)


def check_embedding(
    gate: Gate, exported: Runner, reference: Runner, vocab_size: int, prompts: Sequence[Prompt], limits: ParityLimits
) -> None:
    """``embed_tokens/table``: rows spread over the whole vocabulary, and those of the prompts.

    Rows that are scaled cannot be float16 numbers any more: where the graph gives those, one rounding is allowed.
    """
    spread = np.unique(np.linspace(0, vocab_size - 1, min(vocab_size, _EMBEDDING_ROWS)).astype(np.int64))
    used = [p.exported.input_ids[0] for p in prompts]
    ids = np.unique(np.concatenate([spread, *used]))[None]
    with gate.guard("embed_tokens/table", "embed_tokens", "lowering"):
        wanted, found = reference.embed(ids), exported.embed(ids)
        rounded = found.dtype == np.float16 and not np.array_equal(wanted, wanted.astype(np.float16))
        limit = max(limits.embedding_rel, _FLOAT16_ROUNDING) if rounded else limits.embedding_rel
        gate.close("embed_tokens/table", "embed_tokens", "lowering", wanted, found, limit)


def check_merged(
    gate: Gate, prompts: Sequence[Prompt], exported: Runner, wanted: Mapping[str, DecoderInputs], limits: ParityLimits
) -> None:
    """``model/merged_inputs[probe]``: pixels to decoder input through the export alone; further inputs ``...:<name>``.

    `wanted` is of the original weights: what storing them as float16 costs is judged here, with everything before the
    decoder in one.
    """
    for prompt in prompts:
        name = f"model/merged_inputs[{prompt.name}]"
        with gate.guard(name, "model", "lowering"):
            found, right = merged_input(exported, prompt.exported), wanted[prompt.name]
            gate.close(name, "model", "lowering", right.embeds, found.embeds, limits.merged_rel)
            for extra, array in right.extras.items():
                gate.close(f"{name}:{extra}", "model", "lowering", array, found.extras.get(extra), limits.merged_rel)


def merged_input(runner: Runner, inputs: ModelInputs) -> DecoderInputs:
    """What reaches the decoder of `runner` for one prompt."""
    return merged_inputs(runner, [inputs])[0]


def _pictures(runner: Runner, inputs: ModelInputs) -> Mapping[str, Array]:
    """What the vision encoder gets of a prompt: videos are pictures of several frames there, or tiles."""
    spec = runner.merge_spec
    if has_tiles(spec, inputs.pixel_inputs):
        return {PIXELS: np.concatenate(inputs.pixel_inputs[VIDEO_PIXELS])}
    return as_pictures(spec, inputs.input_ids, inputs.pixel_inputs)[1]


def _pixel_fault(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> str:
    if wanted.keys() != found.keys():
        return f"inputs {sorted(found)}, expected {sorted(wanted)}"
    for name, array in wanted.items():
        if fault := metrics.output_fault(array, found[name]):
            return f"{name}: {fault}"
        if not np.array_equal(array, found[name]):
            return f"{name} differs by up to {metrics.max_abs_difference(array, found[name]):.3g}"
    return ""
