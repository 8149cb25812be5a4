"""What the CPU of this machine can do, as far as the operating system says."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Instructions that multiply uint8 by int8 into 32 bits. Without them ONNX Runtime's x86 kernels add pairs of products
# in 16 bits, which overflow.
_DOT_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni")
_X86 = ("x86_64", "AMD64")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Instruction set flags of the first core as Linux reports them; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return frozenset()
    for line in info.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def int8_gain(flags: frozenset[str], machine: str = "") -> tuple[bool | None, str]:
    """Does a CPU with these instruction set `flags` gain, and why; None when the flags say nothing.

    `machine` is `platform.machine`'s word for the architecture (default: this one's).
    """
    found = [flag for flag in _DOT_PRODUCTS if flag in flags]
    if found:
        return True, f"{found[0]}: INT8 products run several times faster than FP32"
    if not flags:
        return None, "the operating system does not list the CPU's instruction sets; measure with `vlmexport bench`"
    if (machine or platform.machine()) in _X86:
        return False, f"none of {', '.join(_DOT_PRODUCTS)}: INT8 products are slow and overflow here"
    return None, "measured on x86 only; measure with `vlmexport bench`"
