"""The image processor as a graph: from one picture, uint8 ``[height, width, 3]``, to the vision encoder's inputs."""

from __future__ import annotations

import onnx_ir as ir

from vlmexport.lower.onnx.preprocess_numbers import Number, Sheet
from vlmexport.lower.onnx.preprocess_resize import resize
from vlmexport.lower.onnx.preprocess_sizes import nearest_grid, resized, whole_tiles
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.split.preprocess import Exact, GridTiles, Patches, Preprocessing, SquareTiles, Whole

PICTURE = "image"
_INT64 = ir.DataType.INT64
Outputs = dict[str, ir.Value]


def lower_preprocessor(steps: Preprocessing, opset: int) -> ir.Model:
    """The graph of `steps`: input ``image``, outputs as the form in `steps` names them (docs/manifest.md)."""
    sheet = Sheet()
    picture = ir.Value(
        name=PICTURE, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["image_height", "image_width", 3])
    )
    prepared = picture if steps.square is None else _pad_to_square(sheet, picture, steps.square)
    outputs = _formed(sheet, prepared, steps)
    for name, value in outputs.items():
        value.name = name
    graph = ir.Graph(
        [picture],
        list(outputs.values()),
        nodes=sheet.tape.nodes,
        initializers=sheet.tape.initializers,
        opset_imports={"": opset},
        name="preprocessor",
    )
    return ir.Model(graph, ir_version=ir_version(opset), producer_name="vlmexport")


def _formed(sheet: Sheet, picture: ir.Value, steps: Preprocessing) -> Outputs:
    match steps.form:
        case Whole():
            return _whole(sheet, picture, steps)
        case SquareTiles():
            return _square_tiles(sheet, picture, steps, steps.form)
        case GridTiles():
            return _grid_tiles(sheet, picture, steps, steps.form)
        case Patches():
            return _patches(sheet, picture, steps, steps.form)


def _whole(sheet: Sheet, picture: ir.Value, steps: Preprocessing) -> Outputs:
    picture = _resize_step(sheet, picture, steps)
    if steps.crop is not None:
        picture = _crop(sheet, picture, *steps.crop)
    pixels = sheet.op("Transpose", _normalised(sheet, picture, steps), perm=[2, 0, 1])
    pixels = sheet.op("Unsqueeze", pixels, sheet.integers([0]))
    sides: tuple[int | str, int | str] = ("height", "width")
    if steps.crop is not None:
        sides = steps.crop
    elif isinstance(steps.resize, Exact):
        sides = (steps.resize.height, steps.resize.width)
    return {"pixel_values": _typed(pixels, ir.DataType.FLOAT, 1, 3, *sides)}


def _square_tiles(sheet: Sheet, picture: ir.Value, steps: Preprocessing, form: SquareTiles) -> Outputs:
    side, one = sheet.number(form.side), sheet.number(1)
    picture = _resize_step(sheet, picture, steps)
    rows, columns = one, one
    if form.split:
        height, width = whole_tiles(sheet.size(picture, 0), sheet.size(picture, 1), form.side)
        picture = resize(sheet, picture, height, width, steps)
        rows, columns = (height / form.side).integer(), (width / form.side).integer()
    overview = resize(sheet, picture, side, side, steps)
    pixels, count = _tiled(sheet, picture if form.split else overview, overview, (rows, columns), steps)
    pixels = sheet.op("Unsqueeze", pixels, sheet.integers([0]))
    outputs = {"pixel_values": _typed(pixels, ir.DataType.FLOAT, 1, "tiles", 3, form.side, form.side)}
    if form.mask:
        ones = sheet.op("Expand", one.value, sheet.shape(1, count, form.side, form.side))
        outputs["pixel_attention_mask"] = _typed(ones, _INT64, 1, "tiles", form.side, form.side)
    for name, number in (("rows", rows), ("cols", columns)):
        told = (rows * columns > 1).where(number, 0)
        outputs[name] = _typed(sheet.reshape(told.value, 1, 1), _INT64, 1, 1)
    return outputs


def _grid_tiles(sheet: Sheet, picture: ir.Value, steps: Preprocessing, form: GridTiles) -> Outputs:
    rows, columns = nearest_grid(sheet.size(picture, 0), sheet.size(picture, 1), form)
    large = resize(sheet, picture, rows * form.height, columns * form.width, steps)
    overview = resize(sheet, picture, sheet.number(form.height), sheet.number(form.width), steps)
    pixels, _ = _tiled(sheet, large, overview, (rows, columns), steps)
    return {"pixel_values": _typed(pixels, ir.DataType.FLOAT, "tiles", 3, form.height, form.width)}


def _tiled(
    sheet: Sheet, picture: ir.Value, overview: ir.Value, grid: tuple[Number, Number], steps: Preprocessing
) -> tuple[ir.Value, Number]:
    """The tiles of `picture` row by row, and `overview` behind them if there are several; and how many that makes.

    Float32 ``[tiles, 3, height, width]``.
    """
    rows, columns = grid
    height, width = sheet.size(overview, 0), sheet.size(overview, 1)
    cut = sheet.reshape(_normalised(sheet, picture, steps), rows, height, columns, width, 3)
    tiles = sheet.reshape(sheet.op("Transpose", cut, perm=[0, 2, 4, 1, 3]), -1, 3, height, width)
    last = sheet.op("Transpose", _normalised(sheet, overview, steps), perm=[2, 0, 1])
    together = sheet.op("Concat", tiles, sheet.op("Unsqueeze", last, sheet.integers([0])), axis=0)
    several = rows * columns
    count = several + (several > 1).where(sheet.number(1), 0)
    return sheet.cut(together, 0, count, 0), count


def _patches(sheet: Sheet, picture: ir.Value, steps: Preprocessing, form: Patches) -> Outputs:
    pixels = _normalised(sheet, _resize_step(sheet, picture, steps), steps)
    high, wide = ((sheet.size(pixels, axis) / form.size).integer() for axis in (0, 1))
    groups = [(n / form.merge).integer() for n in (high, wide)]
    cut = sheet.reshape(pixels, groups[0], form.merge, form.size, groups[1], form.merge, form.size, 3)
    ordered = sheet.op("Transpose", cut, perm=[0, 3, 1, 4, 6, 2, 5])
    frames = [sheet.op("Unsqueeze", ordered, sheet.integers([5]))] * form.frames
    width = 3 * form.frames * form.size * form.size
    flat = sheet.reshape(sheet.op("Concat", *frames, axis=5), -1, width)
    return {
        "pixel_values": _typed(flat, ir.DataType.FLOAT, "patches", width),
        "image_grid_thw": _typed(sheet.reshape(sheet.shape(1, high, wide), 1, 3), _INT64, 1, 3),
    }


def _resize_step(sheet: Sheet, picture: ir.Value, steps: Preprocessing) -> ir.Value:
    if steps.resize is None:
        return picture
    height, width = resized(sheet.size(picture, 0), sheet.size(picture, 1), steps.resize)
    return resize(sheet, picture, height, width, steps)


def _normalised(sheet: Sheet, picture: ir.Value, steps: Preprocessing) -> ir.Value:
    """Float32 of uint8 ``[..., 3]``, with the processor's roundings: the product in float64, the rest in float32."""
    pixels = picture
    if steps.rescale is not None:
        wide = sheet.cast(pixels, ir.DataType.DOUBLE)
        pixels = sheet.op("Mul", wide, sheet.constant(steps.rescale, ir.DataType.DOUBLE))
    pixels = sheet.cast(pixels, ir.DataType.FLOAT)
    if steps.mean is None or steps.std is None:
        return pixels
    centred = sheet.op("Sub", pixels, sheet.constant(steps.mean, ir.DataType.FLOAT))
    return sheet.op("Div", centred, sheet.constant(steps.std, ir.DataType.FLOAT))


def _pad_to_square(sheet: Sheet, picture: ir.Value, color: tuple[int, int, int]) -> ir.Value:
    """`picture` in the middle of a square of `color`; an odd pixel goes behind it."""
    sides = sheet.size(picture, 0), sheet.size(picture, 1)
    longest = sides[0].most(sides[1])
    ground = sheet.constant(color, ir.DataType.UINT8)
    for axis, side in enumerate(sides):
        before = ((longest - side) / 2).floor()
        for width, behind in ((before, False), (longest - side - before, True)):
            shape = (longest if axis else width, width if axis else sides[1], 3)
            strip = sheet.op("Expand", ground, sheet.shape(*shape))
            picture = sheet.op("Concat", *((picture, strip) if behind else (strip, picture)), axis=axis)
    return picture


def _crop(sheet: Sheet, picture: ir.Value, height: int, width: int) -> ir.Value:
    """The middle `height` x `width` of `picture`, with black around it where it is smaller."""
    for axis, wanted in ((0, height), (1, width)):
        side = sheet.size(picture, axis)
        lacking = (sheet.number(wanted) - side).most(0)
        before = (lacking / 2).ceil()
        pads = sheet.shape(before, lacking - before)
        black = sheet.constant(0, ir.DataType.UINT8)
        picture = sheet.op("Pad", picture, pads, black, sheet.integers([axis]), mode="constant")
        start = ((side - wanted) / 2).floor().most(0)
        picture = sheet.cut(picture, start, start + wanted, axis)
    return picture


def _typed(value: ir.Value, dtype: ir.DataType, *dims: int | str) -> ir.Value:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)
    return value
