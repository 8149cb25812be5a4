"""Positions and deepstack features of a family, found by looking at what reached its decoder, and proven on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.merge import MergeSpec
from vlmexport.model.per_token import PER_LAYER
from vlmexport.model.positions import AXES, prompt_positions
from vlmexport.model.videos import GRID
from vlmexport.split.decoder import DecoderCall, DecoderPart

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

# transformers' names of what early layers add, and of the tokens that it is added to.
_DEEPSTACK = frozenset({"deepstack_visual_embeds", "visual_pos_masks"})
Examples = Sequence[dict[str, torch.Tensor]]


def with_positions(vlm: VLM, merge: MergeSpec, examples: Examples, calls: Sequence[DecoderCall]) -> MergeSpec:
    """`merge` with the positions of the family, when its decoder gets three for each token.

    Raises `UnsupportedModelError` when they are not those that `prompt_positions` counts, on any example.
    """
    if not any(has_axes(call) for call in calls):
        return merge
    family = vlm.facts.model_type
    if any(GRID not in example for example in examples):
        raise UnsupportedModelError(f"{family}: three positions for each token, but its inputs have no {GRID}")
    if (axes := next(c for c in calls if has_axes(c)).kwargs["position_ids"].shape[0]) != AXES:
        raise UnsupportedModelError(
            f"{family}: {axes} positions for each token; only {AXES} (time, height, width) are supported yet"
        )
    size = _merge_size(examples[0], merge.image_token_id)
    found = dataclasses.replace(
        merge, position="mrope", spatial_merge_size=size, extras=(*merge.extras, "position_ids")
    )
    for index, (example, call) in enumerate(zip(examples, calls, strict=True)):
        given = call.kwargs["position_ids"]
        try:
            counted = example_positions(found, example)
        except BadInputError as error:
            raise UnsupportedModelError(f"{family}: positions of example {index}: {error}") from error
        if given.shape != counted.shape or not torch.equal(given, counted):
            raise UnsupportedModelError(
                f"{family}: its positions {tuple(given.shape)} of example {index} are not those of image grids"
            )
    return found


def example_positions(merge: MergeSpec, example: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions int64 ``[3, 1, tokens]`` of one example of the whole model."""
    return torch.from_numpy(prompt_positions(merge, example["input_ids"].numpy(), {GRID: example[GRID].numpy()}))


def with_deepstack(vlm: VLM, merge: MergeSpec, calls: Sequence[DecoderCall]) -> MergeSpec:
    """`merge` with the number of early layers to which the decoder adds features at the image tokens."""
    levels = {len(call.kwargs["deepstack_visual_embeds"]) for call in calls if deepstack_arguments(call)}
    if not levels:
        return merge
    if len(levels) > 1:
        raise UnsupportedModelError(f"{vlm.facts.model_type}: features for {sorted(levels)} early layers")
    return dataclasses.replace(merge, deepstack_layers=max(levels), extras=(*merge.extras, "deepstack_embeds"))


def deepstack_arguments(call: DecoderCall) -> frozenset[str]:
    """Names of the arguments of `call` that say what early layers add; empty when they are not all there."""
    return _DEEPSTACK if call.extras.keys() >= _DEEPSTACK else frozenset()


def dense_deepstack(call: DecoderCall) -> torch.Tensor:
    """What `call` adds to early layers: ``[layers, 1, tokens, hidden]``, zeros off the images."""
    levels, places = call.kwargs["deepstack_visual_embeds"], call.kwargs["visual_pos_masks"]
    made = torch.zeros(len(levels), *call.kwargs["inputs_embeds"].shape, dtype=call.kwargs["inputs_embeds"].dtype)
    for index, rows in enumerate(levels):
        made[index, places] = rows.to(made.dtype)
    return made


def further_inputs(merge: MergeSpec, call: DecoderCall) -> dict[str, torch.Tensor]:
    """The decoder part's further inputs for one captured call."""
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "position_ids": lambda: call.kwargs["position_ids"],
        "deepstack_embeds": lambda: dense_deepstack(call),
        PER_LAYER: lambda: call.kwargs[PER_LAYER],
    }
    return {name: makers[name]() for name in merge.extras if name in makers}


def configure(part: DecoderPart, merge: MergeSpec) -> None:
    """Let `part` take what `merge` says."""
    part.position_axes = AXES if merge.position == "mrope" else 1
    part.deepstack_layers = merge.deepstack_layers


def has_axes(call: DecoderCall) -> bool:
    """Does the decoder get several positions for each token?"""
    positions = call.kwargs.get("position_ids")
    return positions is not None and positions.ndim == AXES and positions.shape[0] > 1


def _merge_size(example: dict[str, torch.Tensor], image_token_id: int) -> int:
    """How many patches one image token is wide and high."""
    patches = int(np.prod(example[GRID].numpy(), axis=1).sum())
    tokens = int((example["input_ids"] == image_token_id).sum())
    return math.isqrt(patches // max(tokens, 1))
