"""What the zoo knows of one family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmexport.model.load import VLM

Example = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One family: `make` writes its tiny checkpoint (no processor) to a folder and returns that.

    `examples` are three keyword inputs of the whole model, as the split wants them: one image, one of another shape
    (where the family lets shapes vary), and two images. The first is traced, the proof is on all of them.
    """

    make: Callable[[Path], Path]
    examples: Callable[[VLM], tuple[Example, ...]]
