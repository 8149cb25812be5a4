"""Small plots as inline SVG: bars with limit marks and a line per step on a logarithmic scale, bars from 0.

Colours come from the page's style sheet (classes), so that the plots follow its light and dark form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vlmexport.verify.report.words import compact

_FLOOR = 1e-12
_ROW = 26
_LABEL_WIDTH, _PLOT_WIDTH, _VALUE_WIDTH = 250, 400, 90
_LINE_HEIGHT, _LINE_MARGIN = 170, 58


@dataclass(frozen=True)
class Bar:
    """One bar: its label, value and limit (in the same unit, both may be 0), and the status as a CSS class."""

    label: str
    value: float
    limit: float
    status: str


@dataclass(frozen=True)
class Group:
    """Bars that belong together under one `label`: name, value (0 or more) and whether it is the export's, of each."""

    label: str
    bars: Sequence[tuple[str, float, bool]]


def bars(rows: Sequence[Bar], title: str) -> str:
    """Horizontal bars on a common log axis; a mark shows each row's own limit."""
    low, high = _decades([v for row in rows for v in (row.value, row.limit)])
    height = _ROW * len(rows) + 30
    width = _LABEL_WIDTH + _PLOT_WIDTH + _VALUE_WIDTH
    parts = [_open(width, height, title)]
    for exponent in _ticks(low, high):
        x = _LABEL_WIDTH + _PLOT_WIDTH * _position(10.0**exponent, low, high)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 24}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 8}" text-anchor="middle">1e{exponent}</text>')
    for index, row in enumerate(rows):
        parts.append(_bar(row, index * _ROW, low, high))
    return "".join([*parts, "</svg>"])


def grouped(groups: Sequence[Group], title: str, unit: str = "") -> str:
    """Horizontal bars from 0 on one linear scale, the export's in the series' colour, the others in grey."""
    named = any(group.label for group in groups)
    left = 190 if named else 110
    plot, right, bar = (620 if named else 220), 90, 22
    top = max((value for group in groups for _, value, _ in group.bars), default=0.0) or 1.0
    gap = 8 if named else 0
    height = sum(bar * len(group.bars) + gap for group in groups) + 4
    parts, y = [_open(left + plot + right, height, title)], 0.0
    for group in groups:
        if group.label:
            parts.append(f'<text class="label" x="0" y="{y + 15}">{escape(group.label)}</text>')
        for name, value, own in group.bars:
            kind, length, end = "own" if own else "other", plot * value / top, left - 8
            words = f"{compact(value)}{f' {unit}' if unit else ''}"
            parts.append(
                f"<g><title>{escape(f'{group.label} {name}: {words}'.strip())}</title>"
                f'<text class="axis" x="{end}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
                f'<rect class="bar {kind}" x="{left}" y="{y + 4}" width="{max(length, 1):.1f}" height="14" rx="2"/>'
                f'<text class="value" x="{left + length + 8:.1f}" y="{y + 15}">{escape(words)}</text></g>'
            )
            y += bar
        y += gap
    return "".join([*parts, "</svg>"])


def line(values: Sequence[float], limit: float | None, title: str, x_label: str) -> str:
    """Points joined by a line over steps 0, 1, … on a log axis, with the limit as a dashed line."""
    width, height = 420, _LINE_HEIGHT
    inner_width, inner_height = width - _LINE_MARGIN - 14, height - 44
    low, high = _decades([*values, *([limit] if limit else [])])

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LINE_MARGIN + inner_width * (step / max(len(values) - 1, 1))
        return x, 8 + inner_height * (1 - _position(value, low, high))

    parts = [_open(width, height, title)]
    for exponent in _ticks(low, high):
        y = place(0, 10.0**exponent)[1]
        parts.append(f'<line class="grid" x1="{_LINE_MARGIN}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{_LINE_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    if limit:
        y = place(0, limit)[1]
        parts.append(f'<line class="limit" x1="{_LINE_MARGIN}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="limit-label" x="{width - 16}" y="{y - 4:.1f}" text-anchor="end">limit</text>')
    points = [place(step, value) for step, value in enumerate(values)]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="series" points="{joined}"/>')
    for (x, y), value in zip(points, values, strict=True):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{compact(value)}</title></circle>')
    for step in sorted({0, (len(values) - 1) // 2, len(values) - 1}):
        x = place(step, 1.0)[0]
        parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 20}" text-anchor="middle">{step}</text>')
    middle = _LINE_MARGIN + inner_width / 2
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join([*parts, "</svg>"])


def _bar(row: Bar, top: float, low: int, high: int) -> str:
    length = _PLOT_WIDTH * _position(row.value, low, high)
    mark = _LABEL_WIDTH + _PLOT_WIDTH * _position(row.limit, low, high)
    value_x = _LABEL_WIDTH + _PLOT_WIDTH + 10
    tip = f"{row.label}: {compact(row.value)}, limit {compact(row.limit)}"
    return (
        f"<g><title>{escape(tip)}</title>"
        f'<text class="label" x="{_LABEL_WIDTH - 10}" y="{top + 16}" text-anchor="end">{escape(row.label)}</text>'
        f'<rect class="bar {row.status}" x="{_LABEL_WIDTH}" y="{top + 5}" '
        f'width="{max(length, 2):.1f}" height="14" rx="2"/>'
        f'<line class="mark" x1="{mark:.1f}" x2="{mark:.1f}" y1="{top + 2}" y2="{top + 22}"/>'
        f'<text class="value" x="{value_x}" y="{top + 16}">{escape(compact(row.value))}</text></g>'
    )


def _open(width: int, height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten that enclose the positive finite values, with room on both sides."""
    useful = [v for v in values if v > _FLOOR and math.isfinite(v)] or [1e-6, 1.0]
    return math.floor(math.log10(min(useful)) - 0.3), math.ceil(math.log10(max(useful)) + 0.1)


def _ticks(low: int, high: int) -> range:
    return range(low, high + 1, max(1, -(-(high - low) // 8)))


def _position(value: float, low: int, high: int) -> float:
    """Where a value lies between the two powers of ten, 0 to 1; infinity is at the end, 0 at the start."""
    if not math.isfinite(value):
        return 1.0
    share = (math.log10(max(value, _FLOOR)) - low) / (high - low)
    return min(max(share, 0.0), 1.0)
