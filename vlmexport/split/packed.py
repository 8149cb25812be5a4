"""Image encoders that take the patches of all pictures in one row, with a grid of sizes, as one traceable whole.

transformers keeps what such encoders compute from the grid (positions of patches, which of them see each other,
windows, interpolation of a table of positions) in functions of ``transformers.vision_utils``, with loops over the
values of the grid. Within `packed_pictures` the same numbers are computed for each patch from tensors alone: attention
is one call over all patches with a mask, and windows are parts of that mask, so patches stay in their order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.attention import plain_attention

_HELPERS = "transformers.vision_utils"
_ATTENTION = "vlmexport_packed"
# Numbers of a segment: pictures, frames, and windows down and across, each less than this.
_MANY = 1 << 15


@contextmanager
def packed_pictures(model: Any) -> Iterator[None]:
    """Within, the image encoder of `model` computes what depends on its pictures' grid as described above.

    Nothing changes for encoders that do not use transformers' helpers, nor for what is no model of transformers.
    """
    encoder = model.get_encoder("image") if hasattr(model, "get_encoder") else None
    places = [] if encoder is None or encoder in (model, model.base_model) else list(_uses(encoder))
    if encoder is None or not places:
        yield
        return
    packed = _Packed(whole=any("seqlens" in name for _, name in places))
    with ExitStack() as stack:
        handle = encoder.register_forward_pre_hook(packed.see, with_kwargs=True)
        stack.callback(handle.remove)
        for module, name in places:
            stack.enter_context(replaced(module, name, getattr(packed, name)))
        stack.enter_context(replaced(nn.functional, "embedding_bag", _mixed_rows))
        stack.enter_context(without_numbers())
        stack.enter_context(_attention(encoder, packed))
        yield


def without_numbers() -> AbstractContextManager[None]:
    """Within, a traced tensor has no numbers: what is cut by them, the features of each picture, is not traced."""
    return replaced(FakeTensor, "tolist", lambda _tensor: [])


def _uses(encoder: nn.Module) -> Iterator[tuple[Any, str]]:
    """The modules of the encoder's code that hold one of the helpers, transformers' or their own, and its name."""
    helpers = sys.modules.get(_HELPERS)
    for code in {type(module).__module__ for module in encoder.modules()}:
        for name in vars(_Packed):
            if name.startswith("get_vision") and helpers is not None:
                held = getattr(sys.modules[code], name, None)
                if held is not None and held is getattr(helpers, name, held):
                    yield sys.modules[code], name


class Segments:
    """Stands for the cumulated lengths of the segments of patches that see each other: `numbers` int64 ``[patches]``.

    Code that cuts queries, keys and values at those lengths gets them whole, and attention is told the segments. `ends`
    is where each picture ends, which are the segments' ends too: a picture has one frame.
    """

    def __init__(self, packed: _Packed, numbers: torch.Tensor, ends: torch.Tensor | None = None) -> None:
        self.packed, self.numbers, self.ends = packed, numbers, ends
        self.mask: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"the image encoder uses lengths of its pictures ({name}) for something else than attention; such encoders "
            "are not supported yet"
        )

    def __getitem__(self, _key: Any) -> Segments:
        return self

    def __sub__(self, _other: Any) -> Segments:
        return self

    def cumsum(self, _axis: int) -> torch.Tensor:
        """Where each segment ends, int64 ``[pictures]``."""
        return self.__getattr__("cumsum") if self.ends is None else self.ends

    def tolist(self) -> list[Any]:
        """The lengths of the pieces: one."""
        self.packed.current = self
        return [self.packed.patches]

    def hidden(self, like: torch.Tensor) -> torch.Tensor:
        """Additive mask ``[1, 1, patches, patches]`` of the type of `like`."""
        if self.mask is None:
            same = self.numbers[:, None] == self.numbers[None, :]
            zero, none = torch.zeros((), dtype=like.dtype), torch.full((), -torch.inf, dtype=like.dtype)
            self.mask = torch.where(same, zero, none)[None, None]
        return self.mask


class _Packed:
    """The helpers, for the patches of the encoder's running call; their names and arguments are transformers'.

    `whole`: attention is over all patches by turns, so that the encoder must put those of windows back in their order.
    """

    def __init__(self, whole: bool = True) -> None:
        self.whole = whole
        self.patches: Any = 0
        self.current: Segments | None = None

    def see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the encoder: its first argument has a row for each patch, perhaps in one batch."""
        first = args[0] if args else next(iter(kwargs.values()))
        batched = first.ndim in (len("NPV"), len("NPCHW")) and first.shape[0] == 1
        self.patches, self.current = first.shape[1 if batched else 0], None

    def get_vision_position_ids(
        self, grid_thw: torch.Tensor, spatial_merge_size: Any, include_temporal: bool = False, kwargs: Any = None
    ) -> torch.Tensor:
        """Row and column of each patch (behind its frame where asked for), int64 ``[patches, 2 or 3]``.

        A tower with another axis for pictures asks for those of one alone, which are the model's own.
        """
        traced = isinstance(grid_thw, FakeTensor) or torch.compiler.is_exporting()
        if not traced and int(grid_thw.prod(dim=1).sum()) != self.patches:
            own: torch.Tensor = sys.modules[_HELPERS].get_vision_position_ids(
                grid_thw, spatial_merge_size, include_temporal
            )
            return own
        _, frame, row, column, _ = self._places(grid_thw, spatial_merge_size)
        return torch.stack((frame, row, column) if include_temporal else (row, column), dim=-1)

    def get_vision_cu_seqlens(
        self, grid_thw: torch.Tensor, merge_temporal: bool = False, kwargs: Any = None
    ) -> Segments:
        """A segment for each frame, or for each picture."""
        image, frame, *_ = self._places(grid_thw, 1)
        ends = (grid_thw[:, 0] * grid_thw[:, 1] * grid_thw[:, 2]).cumsum(0)
        return Segments(self, image if merge_temporal else image * _MANY + frame, ends)

    def get_vision_attention_seqlens(
        self, grid_thw: torch.Tensor, config: Any, merge_temporal: bool = False, kwargs: Any = None
    ) -> tuple[Segments, None]:
        """`get_vision_cu_seqlens`, and no largest length."""
        return self.get_vision_cu_seqlens(grid_thw, merge_temporal), None

    def get_vision_window_index(
        self, grid_thw: torch.Tensor, spatial_merge_size: int, window_size: int, patch_size: int, kwargs: Any = None
    ) -> tuple[torch.Tensor, Segments]:
        """The order of the merged patches, which is theirs, and a segment for each window.

        The order of patches that are not merged before counts behind windows, and is the model's own, unless all
        patches attend to each other in other layers.
        """
        if spatial_merge_size == 1 and not self.whole:
            own: tuple[torch.Tensor, Segments] = sys.modules[_HELPERS].get_vision_window_index(
                grid_thw, spatial_merge_size, window_size, patch_size
            )
            return own
        image, frame, row, column, _ = self._places(grid_thw, spatial_merge_size)
        side = window_size // spatial_merge_size // patch_size * spatial_merge_size
        numbers = ((image * _MANY + frame) * _MANY + row // side) * _MANY + column // side
        return torch.arange(self.patches // spatial_merge_size**2), Segments(self, numbers)

    def get_vision_interpolation_indices_and_weights(
        self,
        grid_thw: torch.Tensor,
        num_grid_per_side: int,
        mode: str = "bilinear",
        align_corners: bool = False,
        spatial_merge_size: int = 1,
        padding: str = "border",
        kwargs: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the table of positions that each patch mixes, int64 ``[patches, taps]``, and their weights."""
        taps_of = sys.modules[_HELPERS]._interpolation_axis_taps_weights
        _, _, row, column, sizes = self._places(grid_thw, spatial_merge_size)
        down, down_weights = taps_of(row, sizes[:, 1], num_grid_per_side, mode, align_corners, padding)
        across, across_weights = taps_of(column, sizes[:, 2], num_grid_per_side, mode, align_corners, padding)
        indices = down[:, :, None] * num_grid_per_side + across[:, None, :]
        weights = down_weights[:, :, None] * across_weights[:, None, :]
        return indices.flatten(1), weights.flatten(1)

    def get_vision_frame_index(self, grid_thw: torch.Tensor, kwargs: Any = None) -> torch.Tensor:
        """Row of a table of times for each patch, int64 ``[patches]``: that of pictures, which have one frame."""
        return torch.zeros(self.patches, dtype=torch.int64)

    def get_vision_temporal_merge_index(
        self, grid_thw: torch.Tensor, kernel_height: int, kernel_width: int, kwargs: Any = None
    ) -> torch.Tensor:
        """The patches of each merged token of pictures, int64 ``[tokens, 1, patches of a token]``."""
        return self._blocks(grid_thw, kernel_height, kernel_width)[:, None]

    def get_vision_pixel_shuffle_index(
        self, grid_thw: torch.Tensor, merge_size: int, kwargs: Any = None
    ) -> torch.Tensor:
        """The patches of one merged token of pictures behind those of the other, int64 ``[patches]``."""
        return self._blocks(grid_thw, merge_size, merge_size).flatten()

    def _blocks(self, grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Of rows of patches, those of each block of `height` x `width`: int64 ``[blocks, height * width]``."""
        size = height * width
        ends = (grid[:, 0] * grid[:, 1] * grid[:, 2]).cumsum(0)
        block = torch.arange(self.patches // size)
        image = (block[:, None] * size >= ends[None, :]).long().sum(1)
        across = grid[image, 2]
        start = torch.cat([ends.new_zeros(1), ends])[image]
        inside = block - start // size
        row, column = inside // (across // width) * height, inside % (across // width) * width
        down, right = torch.arange(size) // width, torch.arange(size) % width
        return (start + row * across + column)[:, None] + down * across[:, None] + right

    def _places(self, grid: torch.Tensor, merge: Any) -> tuple[torch.Tensor, ...]:
        """For each patch its picture, frame, row and column, and its picture's grid ``[patches, 3]``.

        Patches lie in rows of blocks of `merge` x `merge`.
        """
        counts = grid[:, 0] * grid[:, 1] * grid[:, 2]
        ends = counts.cumsum(0)
        patch = torch.arange(self.patches)
        image = (patch[:, None] >= ends[None, :]).long().sum(1)
        sizes = grid[image]
        side = merge[image] if isinstance(merge, torch.Tensor) else merge
        inside = patch - (ends - counts)[image]
        area, width = sizes[:, 1] * sizes[:, 2], sizes[:, 2]
        frame, rest = inside // area, inside % area
        block, within = rest // (side * side), rest % (side * side)
        row = block // (width // side) * side + within // side
        column = block % (width // side) * side + within % side
        return image, frame, row, column, sizes


def _mixed_rows(indices: torch.Tensor, table: torch.Tensor, **settings: Any) -> torch.Tensor:
    """PyTorch's ``embedding_bag`` of weighted rows ``[bags, taps]``, without a loop over them: ``[bags, width]``."""
    weights = settings.get("per_sample_weights")
    if weights is None or settings.keys() != {"mode", "per_sample_weights"} or settings["mode"] != "sum":
        raise UnsupportedModelError("the image encoder mixes rows of a table in a way that is not supported yet")
    rows: torch.Tensor = (table[indices] * weights[..., None]).sum(1)
    return rows


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, `owner` has `value` as its attribute `name`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _attention(encoder: Any, packed: _Packed) -> Iterator[None]:
    """The encoder's attention as it is set, but that it is told which patches see each other."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = encoder.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS.get(before, plain_attention)

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if packed.current is not None:
            attention_mask = packed.current.hidden(query)
        return inner(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_ATTENTION, attend)
    encoder.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)
