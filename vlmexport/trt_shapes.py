"""The sizes that a vision encoder's engine is built for, found from what the model's own processor makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.engines import AxisRange, TrtLimits
from vlmexport.errors import UnsupportedModelError
from vlmexport.split.examples import draw_picture, example_inputs, load_processor
from vlmexport.split.parts import Role
from vlmexport.trt_prediction import patches_per_image

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

# What cameras and screens make: (width, height).
_PICTURES = ((1024, 1024), (1536, 768), (768, 1536))
_IMAGES = "num_images"


def images_of_a_picture(vlm: VLM, split: Split) -> int:
    """As many images (tiles included) as the processor makes of one usual picture.

    Where the model has no processor that works here, as many as the split's examples had.
    """
    seen = max(vision_sizes(split).get(_IMAGES, [1]))
    place = _image_place(split)
    if place is None:
        return seen
    name, axis = place
    try:
        processor = load_processor(vlm)
        made = [example_inputs(vlm, processor, [draw_picture(*size)], "?") for size in _PICTURES]
    except UnsupportedModelError:
        return seen
    return max(seen, *(int(inputs[name].shape[axis]) for inputs in made))


def patches_of_an_image(vlm: VLM, split: Split) -> int:
    """Patches of one image (one tile): by the config, or as the split's examples had them where sizes vary."""
    fixed = patches_per_image(vlm.model.config)
    if fixed:
        return fixed
    sizes = vision_sizes(split)
    patches, counts = sizes.get("num_patches"), sizes.get(_IMAGES)
    if patches is None:
        return 0
    return max(-(-size // count) for size, count in zip(patches, counts or [1] * len(patches), strict=True))


def vision_sizes(split: Split) -> dict[str, list[int]]:
    """Every symbolic axis of the vision side, with its size in each of the split's examples."""
    found: dict[str, list[int]] = {}
    for role in (Role.VISION_ENCODER, Role.PROJECTOR):
        part = split.parts[role]
        for spec in part.signature.inputs:
            for axis, dim in enumerate(spec.dims):
                if isinstance(dim, str) and dim not in found:
                    found[dim] = [int(example[spec.name].shape[axis]) for example in part.examples]
    return found


def vision_axes(split: Split, limits: TrtLimits) -> dict[str, AxisRange]:
    """Ranges of the vision side's symbolic axes: images up to the limit, other axes in proportion to them."""
    sizes = vision_sizes(split)
    counts = sizes.get(_IMAGES)
    ranges: dict[str, AxisRange] = {}
    for name, seen in sizes.items():
        if name == _IMAGES:
            ranges[name] = (1, min(max(seen), limits.max_images), limits.max_images)
            continue
        each = max(-(-size // count) for size, count in zip(seen, counts or [1] * len(seen), strict=True))
        ranges[name] = (1, max(seen), max(max(seen), each * limits.max_images))
    return ranges


def _image_place(split: Split) -> tuple[str, int] | None:
    """The encoder's input and axis that count images; None when none does."""
    for spec in split.parts[Role.VISION_ENCODER].signature.inputs:
        if _IMAGES in spec.dims:
            return spec.name, spec.dims.index(_IMAGES)
    return None
