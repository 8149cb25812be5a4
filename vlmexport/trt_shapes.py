"""The sizes that a vision encoder's engine is built for, found from what the model's own processor makes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vlmexport.engines import AxisRange, TrtLimits
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.merge import MergeSpec
from vlmexport.split.examples import draw_picture, example_inputs, load_processor
from vlmexport.split.parts import Role
from vlmexport.trt_prediction import patches_per_image

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

# What cameras and screens make: (width, height).
_PICTURES = ((1024, 1024), (1536, 768), (768, 1536))
_IMAGES = "num_images"
# TensorRT for RTX 1.7.1 crashes on some encoders (that of the bundled model) where no axis may vary.
_LEAST_LARGEST = 2
# What is said of a model whose field of `MergeSpec` is not the plain one.
_MERGES = {
    "position": "with three positions for each token",
    "mask": "with blocks of tokens that see each other",
    "extras": "with further decoder inputs",
    "packing": "whose image features are packed by the size of the picture",
    "pictures": "whose vision encoder takes one picture at a time",
    "deepstack_layers": "whose image features enter several decoder layers",
}


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
    """Ranges of the vision side's symbolic axes: images up to the limit, other axes in proportion to them.

    Every axis may vary, so an engine takes two images even where ``limits.max_images`` is 1; the limit itself, which
    the prediction and the manifest state, stays what was asked for.
    """
    largest = max(limits.max_images, _LEAST_LARGEST)
    sizes = vision_sizes(split)
    counts = sizes.get(_IMAGES)
    ranges: dict[str, AxisRange] = {}
    for name, seen in sizes.items():
        if name == _IMAGES:
            ranges[name] = (1, min(max(seen), limits.max_images), largest)
            continue
        each = max(-(-size // count) for size, count in zip(seen, counts or [1] * len(seen), strict=True))
        most = each * (largest if counts else limits.max_images)
        ranges[name] = (1, max(seen), max(max(seen), most, _LEAST_LARGEST))
    return ranges


def triton_refusal(split: Split) -> str:
    """Why no Triton repository is written for the model, one line; empty where it is."""
    for role in (Role.VISION_ENCODER, Role.PROJECTOR):
        signature = split.parts[role].signature
        for spec in (*signature.inputs, *signature.outputs):
            if not spec.dims:
                return _refusal(f"whose {role} has the single number {spec.name}")
    return merge_refusal(split.merge)


def merge_refusal(merge: MergeSpec) -> str:
    """`triton_refusal` as far as it depends on the merge: the repository's ``vlm`` only puts rows in place of tokens.

    Positions are counted in the decoder's graph, from wherever they start.
    """
    plain = MergeSpec(merge.image_token_id, position_start=merge.position_start)
    for field in dataclasses.fields(MergeSpec):
        value = getattr(merge, field.name)
        if value != getattr(plain, field.name):
            more = f" ({', '.join(value)})" if isinstance(value, tuple) else ""
            return _refusal(_MERGES.get(field.name, f"with {field.name} {value}") + more)
    return ""


def _refusal(what: str) -> str:
    return f"a Triton repository is not written for a model {what}; leave out --triton"


def _image_place(split: Split) -> tuple[str, int] | None:
    """The encoder's input and axis that count images; None when none does."""
    for spec in split.parts[Role.VISION_ENCODER].signature.inputs:
        if _IMAGES in spec.dims:
            return spec.name, spec.dims.index(_IMAGES)
    return None
