"""What a model's image processor does to one picture, as data: found from its settings, or refused with the setting.

Settings do not tell everything (a class may do more than it says), so whoever builds a graph from a `Preprocessing`
compares it with the processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmexport.errors import UnsupportedModelError

Passes = Literal["columns", "fewer"]
Filter = Literal["bilinear", "bicubic", "lanczos"]
PATCH_LIMIT = 200  # processors that cut patches refuse a picture whose sides have a larger ratio
_FILTERS: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_LARGEST_EDGE = 4096  # what processors that cut tiles clip the long side to
# Settings that change no value, or that are read below.
_READ = frozenset({
    "do_convert_rgb", "do_resize", "size", "default_to_square", "crop_size", "resample", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_pad", "do_center_crop", "data_format", "input_data_format", "device",
    "return_tensors", "disable_grouping", "image_seq_length", "return_row_col_info",
})  # fmt: skip
_SQUARE_TILES = frozenset({"do_image_splitting", "max_image_size"})
_GRID_TILES = frozenset({"crop_to_patches", "min_patches", "max_patches"})
_PATCHES = frozenset({"patch_size", "temporal_patch_size", "merge_size"})
_PAN = frozenset(
    f"pan_and_scan_{name}" for name in ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
)  # without effect unless do_pan_and_scan


@dataclass(frozen=True)
class Exact:
    """Resize to `height` x `width` pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class ShortSide:
    """Resize so that the short side has `edge` pixels, or fewer where the long side would exceed `longest`."""

    edge: int
    longest: int | None = None


@dataclass(frozen=True)
class Inside:
    """Resize, keeping the ratio of the sides, to the largest size within `height` x `width`."""

    height: int
    width: int


@dataclass(frozen=True)
class LongSide:
    """Resize so that the long side has `edge` pixels and the short one an even number (at least 1)."""

    edge: int


@dataclass(frozen=True)
class PatchArea:
    """Resize to multiples of `multiple` with `smallest` to `largest` pixels in all, near the ratio of the sides."""

    multiple: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class Whole:
    """The picture is one tensor: ``pixel_values`` float32 ``[1, 3, height, width]``."""


@dataclass(frozen=True)
class SquareTiles:
    """Tiles of `side` x `side`, row by row, then the whole picture at that size if there is more than one.

    ``pixel_values`` float32 ``[1, tiles, 3, side, side]``, ``rows`` and ``cols`` int64 ``[1, 1]`` (0 for one tile), and
    with `mask` ``pixel_attention_mask`` int64 ``[1, tiles, side, side]``. `split` False makes one tile of the picture.
    """

    side: int
    split: bool
    mask: bool


@dataclass(frozen=True)
class GridTiles:
    """Tiles of `height` x `width` in the grid of `least` to `most` tiles with the nearest ratio of the sides.

    They go row by row, then the whole picture if there is more than one: ``pixel_values`` float32 ``[tiles, 3, height,
    width]``.
    """

    height: int
    width: int
    least: int
    most: int


@dataclass(frozen=True)
class Patches:
    """Flat patches in the order in which `merge` x `merge` of them become one token.

    ``pixel_values`` float32 ``[patches, 3 * frames * size * size]`` (`frames` times the same picture) and
    ``image_grid_thw`` int64 ``[1, 3]``.
    """

    size: int
    frames: int
    merge: int


Resize: TypeAlias = Exact | ShortSide | Inside | LongSide | PatchArea
Form: TypeAlias = Whole | SquareTiles | GridTiles | Patches


@dataclass(frozen=True)
class Preprocessing:
    """The steps in their order: pad to a square of `square` (RGB), `resize` by `resample`, `crop` around the centre.

    Then multiply by `rescale`, subtract `mean` and divide by `std` (one for each channel), and give it its `form`.
    None leaves a step out. `passes` is Pillow's order: ``columns`` before rows, or rows first where that is ``fewer``
    work (Pillow 13). `crop` is (height, width); a picture that is smaller is padded with black.
    """

    resample: Filter
    passes: Passes
    resize: Resize | None
    form: Form
    square: tuple[int, int, int] | None = None
    crop: tuple[int, int] | None = None
    rescale: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    @property
    def level(self) -> tuple[float, float, float]:
        """The step in each channel of ``pixel_values`` that one of the 256 levels of a pixel makes."""
        red, green, blue = self.std or (1.0, 1.0, 1.0)
        step = self.rescale or 1.0
        return step / red, step / green, step / blue


def describe_processor(processor: Any) -> Preprocessing:
    """What `processor` (of a model, or its image processor alone) does to one RGB picture.

    Raises `UnsupportedModelError` naming the setting that has no graph form.
    """
    settings = processor_settings(processor)
    strange = [n for n, value in settings.items() if n not in _READ | _known(settings) and value not in (None, False)]
    if strange:
        raise _refused(strange[0], settings)
    form = _form(settings)
    resize = _tile_resize(settings) if isinstance(form, SquareTiles) else _resize(settings, form)
    pads = bool(settings.get("do_pad")) and not isinstance(form, SquareTiles)
    image_processor = getattr(processor, "image_processor", processor)
    if pads and not hasattr(image_processor, "pad_to_square") and settings.get("pad_size") is not None:
        raise _refused("pad_size", settings)
    mean = _channels(settings, "image_mean") if settings.get("do_normalize") else None
    square = None
    if pads and hasattr(image_processor, "pad_to_square"):
        red, green, blue = _channels(settings, "image_mean")
        square = (int(red * 255), int(green * 255), int(blue * 255))
    rescale = float(settings["rescale_factor"]) if settings.get("do_rescale") else None
    if rescale is None and mean is None:
        raise UnsupportedModelError("--with-preprocessor: do_rescale and do_normalize are both off: pixels stay uint8")
    return Preprocessing(
        resample=_filter(settings),
        passes=pass_order(),
        resize=resize,
        form=form,
        square=square,
        crop=_crop(settings, form),
        rescale=rescale,
        mean=mean,
        std=_channels(settings, "image_std") if mean is not None else None,
    )


def pass_order() -> Passes:
    """In which order the installed Pillow resizes columns and rows: found by resizing a picture of noise."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    bilinear = Image.Resampling.BILINEAR
    columns_first = picture.resize((48, 24), bilinear).resize((48, 12), bilinear)
    same = bool(np.array_equal(np.asarray(picture.resize((48, 12), bilinear)), np.asarray(columns_first)))
    return "columns" if same else "fewer"


def processor_settings(processor: Any) -> dict[str, Any]:
    """The settings of the image processor by name, overridden by those that the processor around it gives it."""
    image_processor = getattr(processor, "image_processor", processor)
    valid = getattr(image_processor, "valid_kwargs", None)
    if valid is None:
        raise UnsupportedModelError(
            f"--with-preprocessor: {type(image_processor).__name__} is no image processor whose settings can be read"
        )
    settings = {name: getattr(image_processor, name, None) for name in valid.__annotations__}
    if image_processor is not processor and hasattr(processor, "_merge_kwargs"):
        merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
        settings.update(merged["images_kwargs"])
    return settings


def _known(settings: Mapping[str, Any]) -> frozenset[str]:
    """The settings beside `_READ` that belong to the form that these settings choose."""
    known = _PAN if not settings.get("do_pan_and_scan") else frozenset()
    if settings.get("max_image_size") is not None:
        known |= _SQUARE_TILES
    if "crop_to_patches" in settings:
        known |= _GRID_TILES
    if all(settings.get(name) is not None for name in ("patch_size", "temporal_patch_size", "merge_size")):
        known |= _PATCHES
    return known | {"pad_size"}


def _form(settings: Mapping[str, Any]) -> Form:
    if settings.get("max_image_size") is not None:
        side = settings["max_image_size"]["longest_edge"]
        return SquareTiles(int(side), bool(settings["do_image_splitting"]), bool(settings["do_pad"]))
    if settings.get("crop_to_patches") and settings["max_patches"] > 1:
        size = _size(settings)
        if not (size.keys() == {"height", "width"} and settings["do_resize"]):
            raise _refused("size", settings)
        return GridTiles(size["height"], size["width"], settings["min_patches"], settings["max_patches"])
    if settings.get("merge_size") is not None:
        if not settings.get("do_resize"):
            raise _refused("do_resize", settings)
        return Patches(settings["patch_size"], settings["temporal_patch_size"], settings["merge_size"])
    return Whole()


def _tile_resize(settings: Mapping[str, Any]) -> Resize | None:
    """Processors that cut square tiles have a rule of their own for ``longest_edge``."""
    if not settings["do_resize"]:
        return None
    size = _size(settings)
    if size.keys() == {"longest_edge"} and size["longest_edge"] <= _LARGEST_EDGE:
        return LongSide(size["longest_edge"])
    if size.keys() == {"height", "width"}:
        return Exact(size["height"], size["width"])
    raise _refused("size", settings)


def _resize(settings: Mapping[str, Any], form: Form) -> Resize | None:
    if isinstance(form, GridTiles) or not settings["do_resize"]:
        return None
    size = _size(settings)
    if isinstance(form, Patches):
        if size.keys() != {"shortest_edge", "longest_edge"}:
            raise _refused("size", settings)
        return PatchArea(form.size * form.merge, size["shortest_edge"], size["longest_edge"])
    if "shortest_edge" in size and size.keys() <= {"shortest_edge", "longest_edge"}:
        return ShortSide(size["shortest_edge"], size.get("longest_edge"))
    if size.keys() == {"max_height", "max_width"}:
        return Inside(size["max_height"], size["max_width"])
    if size.keys() == {"height", "width"}:
        return Exact(size["height"], size["width"])
    raise _refused("size", settings)


def _size(settings: Mapping[str, Any], name: str = "size") -> dict[str, int]:
    size = settings[name] or {}
    found = {side: size.get(side) if isinstance(size, Mapping) else getattr(size, side, None) for side in _SIDES}
    return {side: int(value) for side, value in found.items() if value}


def _crop(settings: Mapping[str, Any], form: Form) -> tuple[int, int] | None:
    if not settings.get("do_center_crop") or not isinstance(form, Whole):
        return None
    size = _size(settings, "crop_size")
    if size.keys() != {"height", "width"}:
        raise _refused("crop_size", settings)
    return size["height"], size["width"]


def _filter(settings: Mapping[str, Any]) -> Filter:
    resample = settings.get("resample")
    number = 2 if resample is None else int(resample)
    if number not in _FILTERS:
        raise _refused("resample", settings)
    return _FILTERS[number]


def _channels(settings: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    value = settings[name]
    values = tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),) * 3
    if len(values) != 3:
        raise _refused(name, settings)
    return values


def _refused(name: str, settings: Mapping[str, Any]) -> UnsupportedModelError:
    value = " ".join(str(settings[name]).split())[:80]
    return UnsupportedModelError(
        f"--with-preprocessor: the image processor's setting {name}={value} has no graph form yet; "
        "export without it and run the processor itself"
    )
