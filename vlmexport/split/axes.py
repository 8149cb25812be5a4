"""Which axes may vary, found by comparing examples and never guessed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmexport.errors import UnsupportedModelError

Dims = tuple[int | str, ...]


def dynamic_dims(examples: Sequence[dict[str, torch.Tensor]], fixed: dict[str, Dims] | None = None) -> dict[str, Dims]:
    """Dims of each tensor name: an axis with the same size in all `examples` is that int, any other gets a name.

    Axes whose sizes agree in every example share one name. `fixed` gives names that are known already (those of a
    graph's inputs, when `examples` also holds its outputs); its dims are kept and their names reused.
    Raises `UnsupportedModelError` when an example lacks a tensor or has it with another rank.
    """
    names: dict[tuple[int, ...], str] = {}
    dims: dict[str, Dims] = {}
    for tensor in examples[0]:
        sizes = _sizes(tensor, examples)
        if fixed and tensor in fixed:
            dims[tensor] = fixed[tensor]
            names.update({s: d for s, d in zip(sizes, fixed[tensor], strict=True) if isinstance(d, str)})
            continue
        for axis, size in enumerate(sizes):
            if len(set(size)) > 1 and size not in names:
                names[size] = _axis_name(tensor, axis, len(sizes), set(names.values()))
        dims[tensor] = tuple(size[0] if len(set(size)) == 1 else names[size] for size in sizes)
    return dims


def _sizes(tensor: str, examples: Sequence[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    """Per axis of `tensor`, its size in each example."""
    shapes = [tuple(example[tensor].shape) if tensor in example else None for example in examples]
    ranks = {None if shape is None else len(shape) for shape in shapes}
    if len(ranks) != 1 or None in ranks:
        raise UnsupportedModelError(f"input {tensor!r} has not the same rank in all examples: shapes {shapes}")
    return list(zip(*[shape for shape in shapes if shape is not None], strict=True))


def _axis_name(tensor: str, axis: int, rank: int, taken: set[str]) -> str:
    """A name that says what varies: whole images, patches of images, or a side of the picture."""
    if rank >= 4 and axis >= rank - 2:
        name = ("height", "width")[axis - rank + 2]
    elif rank >= 3 or "grid" in tensor or "size" in tensor:
        name = "num_images"
    else:
        name = "num_patches"
    return name if name not in taken else f"{tensor}_{axis}"
