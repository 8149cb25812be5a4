"""How ``torch.onnx.export`` is called: silent, without the garbage collector, with one table of operators a process."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

_FILL = "from_torchlib"
_own_fill = ONNXRegistry.__dict__[_FILL]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep torch.onnx's progress lines and warnings off the user's terminal, and what costs it time out of its way.

    A trace makes millions of objects that live until it ends; looking through them again and again took a tenth of the
    export's CPU time. And each export fills its registry of operators from torchlib anew (0.7 CPU-seconds of the 3
    that a small part takes), though only the opset matters to it: here it is filled once.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    collecting = gc.isenabled()
    gc.disable()
    setattr(ONNXRegistry, _FILL, staticmethod(_shared_registry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            setattr(ONNXRegistry, _FILL, _own_fill)
            logger.setLevel(level)
            if collecting:
                gc.enable()


def _shared_registry(*, opset_version: int) -> Any:
    """A registry of an export's own, whose operators are the shared ones."""
    found = copy.copy(_filled(opset_version))
    found.functions = {target: list(forms) for target, forms in found.functions.items()}
    return found


@functools.cache
def _filled(opset_version: int) -> Any:
    return _own_fill.__get__(None, ONNXRegistry)(opset_version=opset_version)
