"""The pictures and prompts that every gate uses: drawn here, the same on every machine, no downloads.

None of them has the size or the number of images that the graphs were traced with alone: another aspect ratio, two
images, no image and a single token are among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Probe:
    """One prompt of the gate: `name` appears in the names of its checks."""

    name: str
    text: str
    images: tuple[Image, ...] = ()


def draw_picture(width: int, height: int, seed: int) -> Image:
    """An RGB picture of flat shapes and lines with a smooth background; the same for the same arguments.

    Every channel covers its range, so that a wrong normalisation, a swapped channel or axis changes the pixels.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    shades = np.stack(
        [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 80 + 90 * (x + y) / (width + height)], -1
    )
    picture = Image.fromarray(shades.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for index in range(6):
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        left, right = sorted(rng.integers(0, width, 2).tolist())
        top, bottom = sorted(rng.integers(0, height, 2).tolist())
        box = (left, top, right + 4, bottom + 4)
        if index % 3 == 0:
            draw.ellipse(box, fill=color)
        elif index % 3 == 1:
            draw.rectangle(box, fill=color)
        else:
            draw.line(box, fill=color, width=3)
    return picture


def standard_probes() -> tuple[Probe, ...]:
    """The prompts of the default gate: square, wide and tall pictures, two pictures, text alone."""
    return (
        Probe("square", "What is in the picture?", (draw_picture(64, 64, 1),)),
        Probe("wide", "Describe the shapes.", (draw_picture(176, 72, 2),)),
        Probe("tall", "How many shapes are there, and where is the largest one?", (draw_picture(60, 130, 3),)),
        Probe("two_images", "What differs?", (draw_picture(64, 64, 4), draw_picture(96, 48, 5))),
        Probe("text", "Name a color and a number."),
    )
