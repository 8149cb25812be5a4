"""Sizes of the vision side's engines, and which models the Triton repository serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vlmexport.engines import TrtLimits
from vlmexport.manifest import TensorSpec
from vlmexport.model.kv import KVGeometry
from vlmexport.model.merge import MergeSpec
from vlmexport.split.parts import Part, Role, Signature, Split
from vlmexport.trt_shapes import merge_refusal, triton_refusal, vision_axes


def split_of(inputs: dict[str, tuple[int | str, ...]], *sizes: dict[str, int], merge: MergeSpec | None = None) -> Split:
    """A split whose encoder and projector take `inputs`; the examples have the symbolic axes of `sizes`."""
    specs = tuple(TensorSpec(name, "float32", dims) for name, dims in inputs.items())
    examples = tuple(
        {s.name: torch.zeros([d if isinstance(d, int) else size[d] for d in s.dims]) for s in specs} for size in sizes
    )
    parts = {
        role: Part(role, nn.Identity(), "", Signature(specs, ()), examples)
        for role in (Role.VISION_ENCODER, Role.PROJECTOR)
    }
    return Split(parts, merge or MergeSpec(7), 0.0, KVGeometry(2, 2, 32))


def test_an_engine_takes_two_images_where_one_is_the_limit() -> None:
    """TensorRT for RTX crashes on some encoders where smallest and largest shape are the same."""
    split = split_of({"pixel_values": (1, "num_images", 3), "grid": ("rows", 2)}, *({"num_images": 1, "rows": 4},) * 2)
    assert vision_axes(split, TrtLimits(1, 64, 1)) == {"num_images": (1, 1, 2), "rows": (1, 4, 8)}
    assert vision_axes(split, TrtLimits(1, 64, 3)) == {"num_images": (1, 1, 3), "rows": (1, 4, 12)}


def test_axes_of_encoders_that_count_no_images_vary_too() -> None:
    split = split_of({"pixel_values": ("patches", 3), "one": ("single", 2)}, {"patches": 6, "single": 1})
    assert vision_axes(split, TrtLimits(1, 64, 1)) == {"patches": (1, 6, 6), "single": (1, 1, 2)}


def test_plain_models_may_have_a_triton_repository() -> None:
    assert triton_refusal(split_of({"pixel_values": ("num_images", 3)}, {"num_images": 1})) == ""
    assert merge_refusal(MergeSpec(9, position_start=2)) == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"position": "mrope", "extras": ("position_ids",)}, "with three positions for each token"),
        ({"extras": ("position_ids", "block_ids")}, "with further decoder inputs (position_ids, block_ids)"),
        ({"mask": "prefix"}, "with blocks of tokens that see each other"),
        ({"pictures": "each"}, "whose vision encoder takes one picture at a time"),
        ({"packing": "tiles"}, "whose image features are packed by the size of the picture"),
        ({"deepstack_layers": 3}, "whose image features enter several decoder layers"),
        ({"spatial_merge_size": 2}, "with spatial_merge_size 2"),
    ],
)
def test_what_the_repositorys_model_does_not_do_is_refused(changed: dict[str, Any], words: str) -> None:
    split = split_of({"pixel_values": ("num_images", 3)}, {"num_images": 1}, merge=replace(MergeSpec(7), **changed))
    assert triton_refusal(split) == f"a Triton repository is not written for a model {words}; leave out --triton"


def test_single_numbers_are_refused() -> None:
    split = split_of({"pixel_values": ("num_images", 3), "scale": ()}, {"num_images": 1})
    assert "whose vision_encoder has the single number scale" in triton_refusal(split)
