"""The sensitivity as a picture (PNG, drawn by Pillow) and as one self-contained page: layers down, modules across."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.calibrate.sensitivity import ModuleEffect, Sensitivity
from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]

# From light to dark over the decades of the scale; text turns white on the dark half.
_RAMP: tuple[Colour, ...] = ((255, 248, 225), (254, 217, 142), (244, 150, 70), (204, 76, 44), (110, 22, 42))
_EMPTY: Colour = (236, 238, 240)
_INK: Colour = (28, 33, 40)
_SOFT: Colour = (92, 101, 112)
_CELL_WIDTH, _CELL_HEIGHT = 104, 40
_LEFT, _TOP, _MARGIN = 118, 128, 28
_LEGEND_HEIGHT = 78
_MAX_DECADES = 5


@dataclass(frozen=True)
class Scale:
    """A logarithmic colour scale from `low` to `high` nats per token, both powers of ten."""

    low: float
    high: float

    @staticmethod
    def of(effects: tuple[ModuleEffect, ...]) -> Scale:
        """The decades that the effects reach into, at most the upper five; what is smaller has the lowest colour."""
        largest = max((e.kl for e in effects), default=0.0)
        top = math.ceil(math.log10(largest)) if largest > 0 else 0
        smallest = min((e.kl for e in effects if e.kl > 0), default=10.0 ** (top - 1))
        bottom = max(min(math.floor(math.log10(smallest)), top - 1), top - _MAX_DECADES)
        return Scale(10.0**bottom, 10.0**top)

    def position(self, kl: float) -> float:
        """Where `kl` lies, from 0 at `low` to 1 at `high`."""
        if kl <= self.low:
            return 0.0
        return min(math.log10(kl / self.low) / math.log10(self.high / self.low), 1.0)

    def colour(self, kl: float) -> Colour:
        """The colour of `kl`."""
        return _blend(self.position(kl))

    def ticks(self) -> list[float]:
        """The powers of ten on the scale."""
        first, last = round(math.log10(self.low)), round(math.log10(self.high))
        return [10.0**exponent for exponent in range(first, last + 1)]


def _blend(position: float) -> Colour:
    place = position * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    share = place - index
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True))
    return red, green, blue


def _ink_on(scale: Scale, kl: float) -> Colour:
    return (255, 255, 255) if scale.position(kl) > 0.6 else _INK


def short_kind(kind: str) -> str:
    """``self_attn.q_proj`` as ``q_proj``."""
    return kind.rpartition(".")[2]


def short_number(value: float) -> str:
    """``1.2e-4``: two digits and no leading zero in the exponent."""
    if value <= 0:
        return "0"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def title(found: Sensitivity) -> str:
    """What was measured, in one line."""
    scheme = found.scheme
    group = "rows" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    how = f"{scheme.algorithm}, {scheme.bits} bits, {group}"
    return f"{found.model}: divergence when one module alone is quantized ({how})"


def subtitle(found: Sensitivity) -> str:
    """The samples, and what all modules together come to."""
    all_of = found.together
    return (
        f"KL in nats per token, mean over {all_of.tokens} text tokens of {all_of.samples} held-out samples; "
        f"all together {short_number(all_of.kl)}"
    )


def check_report_folder(folder: Path) -> None:
    """Refuse, before the long work it is for, a `folder` that is a file, below one, or may not be written.

    Raises `BadInputError` naming it; nothing is made.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise BadInputError(f"--out {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise BadInputError(f"--out {folder}: {place} may not be written; give another folder")


def write_report(found: Sensitivity, folder: Path) -> None:
    """Write ``heatmap.png``, ``heatmap.html`` and ``sensitivity.json`` to `folder`, which is made.

    Raises `BadInputError` when that is a file.
    """
    check_report_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_png(found, folder / "heatmap.png")
    write_html(found, folder / "heatmap.html")
    (folder / "sensitivity.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")


def write_png(found: Sensitivity, path: Path) -> None:
    """Draw the heat map to `path` (PNG, RGB)."""
    from PIL import Image, ImageDraw, ImageFont

    columns, rows = found.kinds, found.layers
    needed = max(len(title(found)) * 8.6, len(subtitle(found)) * 7.2)
    width = max(_LEFT + _CELL_WIDTH * max(len(columns), 1) + _MARGIN, int(needed) + 2 * _MARGIN, 640)
    outside_top = _TOP + _CELL_HEIGHT * len(rows) + 12
    height = outside_top + (_CELL_HEIGHT + 4) * len(found.outside) + _LEGEND_HEIGHT + 16
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    scale = Scale.of(found.effects)
    draw.text((_MARGIN, 22), title(found), _INK, ImageFont.load_default(17))
    draw.text((_MARGIN, 50), subtitle(found), _SOFT, ImageFont.load_default(14))
    label = ImageFont.load_default(14)
    for column, kind in enumerate(columns):
        x = _LEFT + _CELL_WIDTH * column + _CELL_WIDTH / 2
        draw.text((x, _TOP - 12), short_kind(kind), _INK, label, anchor="ms")
    for row, layer in enumerate(rows):
        y = _TOP + _CELL_HEIGHT * row
        draw.text((_LEFT - 14, y + _CELL_HEIGHT / 2), f"layer {layer}", _INK, label, anchor="rm")
        for column, kind in enumerate(columns):
            _draw_cell(draw, (_LEFT + _CELL_WIDTH * column, y), _CELL_WIDTH, found.cell(layer, kind), scale)
    for row, effect in enumerate(found.outside):
        y = outside_top + (_CELL_HEIGHT + 4) * row
        draw.text((_LEFT - 14, y + _CELL_HEIGHT / 2), short_kind(effect.kind), _INK, label, anchor="rm")
        _draw_cell(draw, (_LEFT, y), _CELL_WIDTH, effect, scale)
    _draw_legend(draw, (_LEFT, height - _LEGEND_HEIGHT), min(width - _LEFT - _MARGIN, 460), scale)
    image.save(path, "PNG")


def _draw_cell(
    draw: ImageDraw, corner: tuple[float, float], width: float, effect: ModuleEffect | None, scale: Scale
) -> None:
    from PIL import ImageFont

    x, y = corner
    box = (x + 1, y + 1, x + width - 2, y + _CELL_HEIGHT - 2)
    if effect is None:
        draw.rectangle(box, fill=_EMPTY)
        return
    draw.rectangle(box, fill=scale.colour(effect.kl))
    centre = (x + width / 2, y + _CELL_HEIGHT / 2)
    draw.text(centre, short_number(effect.kl), _ink_on(scale, effect.kl), ImageFont.load_default(14), anchor="mm")


def _draw_legend(draw: ImageDraw, corner: tuple[float, float], width: int, scale: Scale) -> None:
    from PIL import ImageFont

    x, y = corner
    font = ImageFont.load_default(13)
    draw.text((x, y + 4), "nats per token (logarithmic)", _SOFT, font, anchor="ls")
    for step in range(width):
        draw.line((x + step, y + 12, x + step, y + 28), fill=_blend(step / (width - 1)))
    for tick in scale.ticks():
        place = x + scale.position(tick) * (width - 1)
        draw.line((place, y + 28, place, y + 33), fill=_SOFT)
        draw.text((place, y + 38), short_number(tick).replace("1.0e", "1e"), _INK, font, anchor="mt")


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2128;--soft:#5c6570;--empty:#eceef0}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e4e8ec;--soft:#9aa4af;--empty:#22272e}}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:32px 24px}h1{font-size:21px;margin:0 0 4px}.soft{color:var(--soft)}
.wide{overflow-x:auto}
"""
# Of `heat_table`, for any page; ``--empty`` is the colour of a module that is not quantized.
HEAT_STYLE = """
.heat{border-collapse:separate;border-spacing:2px;width:auto;font-variant-numeric:tabular-nums}
.heat th{font-weight:600;padding:4px 10px;white-space:nowrap;font-size:13.5px;border:0}.heat th.row{text-align:right}
.heat td{min-width:76px;text-align:center;padding:8px 10px;font-size:13.5px;border-radius:3px;border:0}
.heat td.none{background:var(--empty)}
.scale{height:14px;max-width:460px;margin-top:24px;border-radius:3px}
.ticks{display:flex;justify-content:space-between;max-width:460px;font-size:13px}
"""


def write_html(found: Sensitivity, path: Path) -> None:
    """Write the heat map as an HTML page to `path` (UTF-8)."""
    path.write_text(page(found), encoding="utf-8")


def page(found: Sensitivity) -> str:
    """The heat map as an HTML document without scripts."""
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in found.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>vlmexport sensitivity</title><style>{_STYLE}{HEAT_STYLE}</style></head><body><main>"
        f'<h1>{escape(title(found))}</h1><p class="soft">{escape(subtitle(found))}</p>{notes}'
        f"{heat_table(found)}</main></body></html>\n"
    )


def heat_table(found: Sensitivity) -> str:
    """The cells and their scale as HTML; hovering a cell shows the weight's name and its 95 % limit."""
    scale = Scale.of(found.effects)
    header = "".join(f"<th>{escape(short_kind(kind))}</th>" for kind in found.kinds)
    rows = [f"<tr><th></th>{header}</tr>"]
    for layer in found.layers:
        cells = "".join(_html_cell(found.cell(layer, kind), scale) for kind in found.kinds)
        rows.append(f'<tr><th class="row">layer {layer}</th>{cells}</tr>')
    for effect in found.outside:
        rows.append(f'<tr><th class="row">{escape(short_kind(effect.kind))}</th>{_html_cell(effect, scale)}</tr>')
    ramp = ",".join(f"rgb{colour}" for colour in _RAMP)
    ticks = "".join(f"<span>{short_number(t).replace('1.0e', '1e')}</span>" for t in scale.ticks())
    return (
        f'<div class="wide"><table class="heat">{"".join(rows)}</table></div>'
        f'<div class="scale" style="background:linear-gradient(90deg,{ramp})"></div><div class="ticks">{ticks}</div>'
    )


def _html_cell(effect: ModuleEffect | None, scale: Scale) -> str:
    if effect is None:
        return '<td class="none"></td>'
    tip = escape(f"{effect.name}: {effect.kl:.2e}, 95 % limit {effect.upper:.2e}", quote=True)
    style = f"background:rgb{scale.colour(effect.kl)};color:rgb{_ink_on(scale, effect.kl)}"
    return f'<td title="{tip}" style="{style}">{short_number(effect.kl)}</td>'
