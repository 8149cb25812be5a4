"""The gate's prompt with a video, for exports that take one: what the whole model makes of it is what the runners make.

As a probe among the others it goes through every part and the decoder; here the rule by which it gets there is judged.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.model.merge import MergeSpec
from vlmexport.model.videos import VIDEO_PIXELS, token_kinds
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.video import Video
from vlmexport.runtime.video_prompt import build_video_prompt, require_video_inputs
from vlmexport.split.decoder import capture_decoder_call
from vlmexport.split.positions import further_inputs
from vlmexport.verify.gates import Gate
from vlmexport.verify.inputs import draw_picture
from vlmexport.verify.parts import Prompt

if TYPE_CHECKING:
    from vlmexport.verify.reference import Reference

PROBE = "video"
_CHECK = f"processor/probe[{PROBE}]"
# Both sides compute the very same in float32.
_LIMIT = 1e-5
_KINDS = "mm_token_type_ids"


def drawn_video() -> Video:
    """Frames of an odd number, none like another, at a rate that is no whole number."""
    return Video(tuple(draw_picture(96, 64, seed) for seed in range(20, 25)), 2.5)


def video_prompts(
    gate: Gate, artifact: Artifact, builders: tuple[PromptBuilder, PromptBuilder | None], reference: Reference | None
) -> list[Prompt]:
    """One prompt with a video by the export's processor and the model's own (`builders`); none for other exports.

    Where none can be made on this machine, ``processor/probe[video]`` is reported as not run, with the reason.
    """
    if MergeSpec.from_dict(artifact.manifest.model["merge"]).video is None:
        return []
    if reference is not None and reference.runner.merge_spec.video is None:
        gate.fail(_CHECK, "processor", "lowering", "the manifest has a rule for videos, the original model takes none")
        return []
    exported, own = builders
    try:
        wanted = _build(own or exported, artifact)
    except BadInputError as error:
        gate.not_run(_CHECK, "processor", "lowering", f"no prompt with a video can be made here: {error}")
        return []
    with gate.guard(_CHECK, "processor", "lowering"):
        return [Prompt(PROBE, wanted if own is None else _build(exported, artifact), None if own is None else wanted)]
    return []


def _build(builder: PromptBuilder, artifact: Artifact) -> ModelInputs:
    inputs = build_video_prompt(builder, [], drawn_video(), "What happens?")
    require_video_inputs(artifact, inputs)
    return inputs


def check_video(
    gate: Gate, prompts: Sequence[Prompt], reference: Reference, wanted: Mapping[str, DecoderInputs]
) -> None:
    """``model/video[probe]``: what the whole model gives its own decoder for a video, against `wanted`.

    `wanted` is what the reference's runner makes of the same by the rule of the split, which is all that the other
    checks know. Further inputs are ``...:<name>``.
    """
    for prompt in prompts:
        if prompt.reference is None or VIDEO_PIXELS not in prompt.reference.pixel_inputs:
            continue
        name, made = f"model/video[{prompt.name}]", wanted[prompt.name]
        with gate.guard(name, "model", "lowering"):
            call = capture_decoder_call(reference.vlm.model, _whole_inputs(reference, prompt.reference))
            gate.close(name, "model", "lowering", call.kwargs["inputs_embeds"].numpy(), made.embeds, _LIMIT)
            for extra, array in further_inputs(reference.runner.merge_spec, call).items():
                gate.close(f"{name}:{extra}", "model", "lowering", array.numpy(), made.extras.get(extra), _LIMIT)


def _whole_inputs(reference: Reference, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """What the whole model takes of the prompt: the processor's tensors, and the kind of each token if it asks."""
    model: Any = reference.vlm.model
    ids = torch.from_numpy(inputs.input_ids)
    given = {name: torch.from_numpy(np.require(array, requirements=["C", "W"]))
             for name, array in inputs.pixel_inputs.items()}  # fmt: skip
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if _KINDS in inspect.signature(model.forward).parameters:
        given[_KINDS] = torch.from_numpy(token_kinds(reference.runner.merge_spec, inputs.input_ids)).int()
    return given
