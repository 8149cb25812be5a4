"""The size to which an image processor resizes, from the picture's own: its formulas, in double precision as there."""

from __future__ import annotations

from vlmexport.lower.onnx.preprocess_numbers import Number
from vlmexport.split.preprocess import PATCH_LIMIT, Exact, GridTiles, Inside, LongSide, PatchArea, Resize, ShortSide

Size = tuple[Number, Number]


def resized(height: Number, width: Number, rule: Resize) -> Size:
    """Height and width (int64 scalars) after `rule`; a picture that would have no pixels left stops the run."""
    height, width = _by_rule(height, width, rule)
    return height.only_if((height > 0) & (width > 0)), width


def _by_rule(height: Number, width: Number, rule: Resize) -> Size:
    match rule:
        case Exact():
            return height.sheet.number(rule.height), height.sheet.number(rule.width)
        case ShortSide():
            return _short_side(height, width, rule)
        case Inside():
            ratio = _over(rule.height, height).least(_over(rule.width, width))
            return (height * ratio).integer(), (width * ratio).integer()
        case LongSide():
            return _long_side(height, width, rule.edge)
        case PatchArea():
            return _patch_area(height, width, rule)


def whole_tiles(height: Number, width: Number, side: int) -> Size:
    """Multiples of `side`: of the long side first, and of the short one that goes with it."""
    aspect = width / height
    wide = width >= height
    by_width, by_height = _multiple(width, side), _multiple(height, side)
    new_height = wide.where(_multiple((by_width / aspect).integer(), side), by_height)
    new_width = wide.where(by_width, _multiple((by_height.double() * aspect).integer(), side))
    return new_height, new_width


def nearest_grid(height: Number, width: Number, form: GridTiles) -> Size:
    """Rows and columns of the grid whose ratio is nearest to the picture's.

    Of several equally near ones it is the first with the fewest tiles, or the last that the picture is large enough
    for: more pixels than half of the grid's.
    """
    sheet = height.sheet
    sides = range(1, form.most + 1)
    grids = sorted(
        ((columns, rows) for columns in sides for rows in sides if form.least <= columns * rows <= form.most),
        key=lambda grid: grid[0] * grid[1],
    )
    ratios = sheet.numbers([columns / rows for columns, rows in grids])
    halves = sheet.numbers([0.5 * form.height * form.width * c * r for c, r in grids])
    distance = (width / height - ratios).absolute()
    nearest = distance.equals(distance.smallest())
    number = sheet.numbers(range(len(grids)))
    first = nearest.where(number, len(grids)).smallest()
    last = (nearest & (halves < (height * width).double())).where(number, -1).largest()
    chosen = first.most(last)
    tables = [sheet.numbers([grid[axis] for grid in grids]) for axis in (1, 0)]
    return tables[0].take(chosen), tables[1].take(chosen)


def _over(limit: int, side: Number) -> Number:
    return side.sheet.number(limit) / side


def _multiple(side: Number, step: int) -> Number:
    return (side / step).ceil() * step


def _long_side(height: Number, width: Number, edge: int) -> Size:
    aspect = width / height
    wide = width >= height
    long = height.sheet.number(edge)
    new_height = wide.where(_even((long / aspect).integer()), long)
    new_width = wide.where(long, _even((long.double() * aspect).integer()))
    return new_height.most(1), new_width.most(1)


def _even(side: Number) -> Number:
    return (side / 2).ceil() * 2


def _short_side(height: Number, width: Number, rule: ShortSide) -> Size:
    if rule.longest is None:
        tall = (height * rule.edge / width).integer()
        broad = (width * rule.edge / height).integer()
        upright = width <= height
        edge = height.sheet.number(rule.edge)
        return upright.where(tall, edge), upright.where(edge, broad)
    short, long = height.least(width).double(), height.most(width).double()
    exceeds = (long / short) * rule.edge > rule.longest
    wanted = exceeds.where(short * rule.longest / long, float(rule.edge))
    edge = wanted.round()
    exact = exceeds.where(wanted, edge.double())
    same = height.least(width).equals(edge)
    new_height = (width < height).where((exact * height / width).integer(), edge)
    new_width = (width < height).where(edge, (exact * width / height).integer())
    return same.where(height, new_height), same.where(width, new_width)


def _patch_area(height: Number, width: Number, rule: PatchArea) -> Size:
    height = height.only_if(height.most(width) / height.least(width) <= PATCH_LIMIT)
    step = rule.multiple
    near_height, near_width = (height / step).round() * step, (width / step).round() * step
    area = height * width
    shrink = (area / rule.largest).root()
    small = [(side / shrink / step).floor() * step for side in (height, width)]
    grow = (height.sheet.number(rule.smallest) / area).root()
    large = [(side.double() * grow / step).ceil() * step for side in (height, width)]
    too_large, too_small = near_height * near_width > rule.largest, near_height * near_width < rule.smallest
    chosen = [
        too_large.where(less.most(step), too_small.where(more, near))
        for near, less, more in zip((near_height, near_width), small, large, strict=True)
    ]
    return chosen[0], chosen[1]
