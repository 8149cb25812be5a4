"""How many threads a gate uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SMALL_EXPORT_BYTES = 64 << 20


def good_threads(size: int) -> int:
    """One for an export of so few bytes that handing work between threads costs more than it saves; 0: all."""
    return 1 if size < SMALL_EXPORT_BYTES else 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch with `count` threads (0: as it is) for the length of the block."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
