"""Memory-mapped weights: give their pages back to the system once a tensor has been used."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MADV_PAGEOUT = 21  # Linux 5.4; clean pages of a file are dropped, others are left as they are where there is no swap


def drop_pages(tensor: torch.Tensor) -> None:
    """Tell the system that the pages under `tensor` (on the CPU) are not needed soon.

    A hint, safe for any memory: the content stays, a memory-mapped file is read again when it is touched. Elsewhere
    than on Linux nothing happens.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < mmap.PAGESIZE or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _madvise() if length > 0 else None
    if advise is not None:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


@cache
def _madvise() -> Any:
    """The C library's ``madvise``; None on other systems, where the advice has another number or none."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
