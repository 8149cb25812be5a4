"""Pillow's resampling of 8-bit pictures as a graph.

Pillow changes the number of columns, rounds to whole levels, and then the number of rows; from version 13 on rows come
first where that saves work (the rule is in `_rows_first`, as measured). A filter grows with the shrinking ratio; its
weights are computed in double precision, divided by their sum, and rounded to 22 bits behind the point. All of that is
repeated here with the same numbers in the same order, and the products of levels and weights are whole numbers below
2^53: the result is Pillow's.

A weight matrix from every source to every result column would be nearly all zeros. Results are computed in blocks of
`BLOCK`, each from the window of sources that it needs.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from vlmexport.lower.onnx.preprocess_numbers import Number, Sheet
from vlmexport.split.preprocess import Filter, Preprocessing

BLOCK = 32
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_UNIT = float(1 << 22)  # of the rounded weights
_CUBIC = -0.5  # Pillow's bicubic is the Catmull-Rom spline


def resize(sheet: Sheet, picture: ir.Value, height: Number, width: Number, steps: Preprocessing) -> ir.Value:
    """`picture` uint8 ``[rows, columns, 3]`` as uint8 ``[height, width, 3]`` by the filter of `steps`."""
    rows, columns = sheet.size(picture, 0), sheet.size(picture, 1)
    upright = _rows_first(rows - height, columns - width, steps)
    first, second = upright.where(height, width), upright.where(width, height)
    given = sheet.turned_unless(upright, picture)
    half = _resample(sheet, _flat(sheet, given), first, steps.resample)
    half = sheet.op("Transpose", sheet.reshape(half, first, -1, 3), perm=[1, 0, 2])
    whole = _resample(sheet, _flat(sheet, half), second, steps.resample)
    lying = sheet.reshape(whole, second, first, 3)
    return sheet.reshape(sheet.turned_unless(upright.negated(), lying), height, width, 3)


def _rows_first(lost_rows: Number, lost_columns: Number, steps: Preprocessing) -> Number:
    """Is the number of rows changed before that of columns?"""
    if steps.passes == "columns":
        return Number(lost_rows.sheet, lost_rows.sheet.constant(False, ir.DataType.BOOL), ir.DataType.BOOL)
    return lost_rows > lost_columns.most(0) * 2


def _flat(sheet: Sheet, picture: ir.Value) -> ir.Value:
    """``[a, b, 3]`` as ``[a, b * 3]``."""
    return sheet.reshape(picture, sheet.size(picture, 0), sheet.size(picture, 1) * 3)


def _resample(sheet: Sheet, given: ir.Value, length: Number, resample: Filter) -> ir.Value:
    """Uint8 ``[old, n]`` as uint8 ``[length, n]``: each result row is a weighted sum of given rows."""
    old = sheet.size(given, 0)
    scale = old.double() / length
    stretch = scale.most(1.0)
    reach = stretch * _SUPPORT[resample]
    blocks = (length.double() / float(BLOCK)).ceil()
    results = sheet.range(blocks * BLOCK).least(length - 1)  # the last block repeats the last result
    centers = (results.double() + 0.5) * scale
    first = (centers - reach + 0.5).integer().most(0)
    last = (centers + reach + 0.5).integer().least(old)
    heads = sheet.range(blocks) * BLOCK
    starts = first.take(heads)
    window = sheet.range((last.take(heads + (BLOCK - 1)) - starts).largest())
    sources = starts.column() + window  # [blocks, window]
    places = sources.row()  # [blocks, 1, window]
    inside = (places >= _by_block(first)) & (places < _by_block(last))
    distances = (places.double() - _by_block(centers) + 0.5) * (sheet.number(1.0) / stretch)
    weights = _weights(inside, _filter(distances, resample))
    rows = sheet.op("Gather", given, sources.least(old - 1).value, axis=0)  # [blocks, window, n]
    sums = sheet.op("MatMul", weights.value, sheet.cast(rows, ir.DataType.DOUBLE))
    levels = ((Number(sheet, sums, ir.DataType.DOUBLE) + _UNIT / 2) / _UNIT).floored().least(255.0).most(0.0)
    flat = sheet.reshape(sheet.cast(levels.value, ir.DataType.UINT8), blocks * BLOCK, sheet.size(given, 1))
    return sheet.cut(flat, 0, length, 0)


def _by_block(results: Number) -> Number:
    """One number for each result as ``[blocks, BLOCK, 1]``."""
    return Number(results.sheet, results.sheet.reshape(results.value, -1, BLOCK), results.kind).column()


def _weights(inside: Number, values: Number) -> Number:
    """Whole numbers in float64 ``[blocks, BLOCK, window]``, 0 where a source is not `inside` the filter."""
    kept = inside.where(values, 0.0)
    shares = kept / kept.total() * _UNIT
    return shares.sign() * (shares.absolute() + 0.5).floored()


def _filter(x: Number, resample: Filter) -> Number:
    """Pillow's filter at distance `x` from its centre, before it is divided by the sum."""
    distance = x.absolute()
    if resample == "bilinear":
        return (distance < 1.0).where(x.sheet.number(1.0) - distance, 0.0)
    if resample == "bicubic":
        near = (distance * (_CUBIC + 2.0) - (_CUBIC + 3.0)) * distance * distance + 1.0
        far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * _CUBIC
        return (distance < 1.0).where(near, (distance < 2.0).where(far, 0.0))
    return ((x >= -3.0) & (x < 3.0)).where(_sinc(x) * _sinc(x / 3.0), 0.0)


def _sinc(x: Number) -> Number:
    angle = x * math.pi
    centre = x.equals(0.0)
    return centre.where(1.0, angle.sine() / centre.where(1.0, angle))
