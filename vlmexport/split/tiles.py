"""Families that cut pictures of any resolution into tiles: what the tower sees, and what is packed on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.model.anyres import PIXELS, SIZES, AnyRes
from vlmexport.split.features import FeatureCall
from vlmexport.split.names import module_path

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

_PACK, _NEWLINE = "pack_image_features", "image_newline"
_LIMITED = "anyres_max_"


@dataclass(frozen=True)
class Tiling:
    """How the model packs tiles, and the module that does it."""

    anyres: AnyRes
    owner: Any

    @property
    def newline(self) -> torch.Tensor | None:
        """The learned row that ends every line, ``[hidden]``."""
        row: torch.Tensor | None = getattr(self.owner, _NEWLINE, None)
        return row

    def newline_name(self, model: nn.Module) -> tuple[str, ...]:
        """Its whole-model name, in a tuple; an empty one when there is none."""
        path = module_path(model, self.owner)
        return () if self.newline is None else (f"{path}.{_NEWLINE}" if path else _NEWLINE,)

    def unpacked(self, ask: FeatureCall) -> FeatureCall:
        """`ask`, but it gives the rows of the tiles as the projector made them."""
        return FeatureCall(_without_packing(self.owner, ask.function), ask.arguments)

    def of_tiles(self, ask: FeatureCall) -> FeatureCall:
        """`unpacked` for inputs that are tiles already; only what comes before the projector means something."""
        run = _without_packing(self.owner, ask.function)
        sizes = [(self.anyres.tile, self.anyres.tile)]

        def function(_owner: Any, **inputs: torch.Tensor) -> Any:
            return run(**inputs, **{ask.arguments[SIZES]: sizes})

        return FeatureCall(MethodType(function, self.owner), {PIXELS: ask.arguments[PIXELS]})

    def tiles(self, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tower's inputs for the processor's."""
        counts = self.anyres.counts({name: t.numpy() for name, t in example.items() if name != PIXELS})
        pixels = example[PIXELS]
        if pixels.ndim > 4:
            pixels = torch.cat([picture[:count] for picture, count in zip(pixels, counts, strict=True)])
        return {PIXELS: pixels}


def find_tiling(vlm: VLM, ask: FeatureCall) -> Tiling | None:
    """How the model cuts pictures into tiles; None when it does not. What is found here is proven by `split_vision`."""
    owner: Any = getattr(ask.function, "__self__", None)
    config: Any = vlm.config
    resolutions = getattr(config, "image_grid_pinpoints", None)
    if not hasattr(owner, _PACK) or not resolutions or not {PIXELS, SIZES} <= ask.arguments.keys():
        return None
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    ratio = str(getattr(config, "vision_aspect_ratio", ""))
    most = int(ratio.removeprefix(_LIMITED)) if ratio.startswith(_LIMITED) else 0
    newline = getattr(owner, _NEWLINE, None) is not None
    return Tiling(AnyRes(tuple((h, w) for h, w in resolutions), side, side // patch, newline, most), owner)


def _without_packing(owner: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(itself: Any, **inputs: Any) -> Any:
        with _rows_as_they_are(itself):
            return function(**inputs)

    return MethodType(run, owner)


@contextmanager
def _rows_as_they_are(owner: Any) -> Iterator[None]:
    owner.__dict__[_PACK] = lambda features, *_args, **_kwargs: (features, None)
    try:
        yield
    finally:
        del owner.__dict__[_PACK]
