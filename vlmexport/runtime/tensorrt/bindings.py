"""What a machine has for running engines: NVIDIA's Python modules and a GPU. Tests put other ones in their place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmexport.engines import LIBRARIES, MODULES, Flavour
from vlmexport.runtime.tensorrt.cuda import CudaDevice, Device, GpuStatus, gpu_status


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two modules, imported: both have the same classes."""

    flavour: Flavour
    version: str
    module: Any


def load_library(flavour: Flavour) -> Library | None:
    """The module of `flavour`, imported; None where it is not installed, or its libraries are not.

    The ``tensorrt`` of the package index is an installer that fetches from NVIDIA; without its libraries it does not
    import.
    """
    try:
        module = importlib.import_module(MODULES[flavour])
        return Library(flavour, str(module.__version__), module)
    except (ImportError, OSError, AttributeError):
        return None


def installed_flavours() -> dict[Flavour, str]:
    """The versions of the modules that can be imported here."""
    found = [library for flavour in LIBRARIES if (library := load_library(flavour)) is not None]
    return {library.flavour: library.version for library in found}


@dataclass(frozen=True)
class Hardware:
    """A machine: its GPU, how a module is loaded, and how its memory is reached."""

    gpu: GpuStatus
    library: Callable[[Flavour], Library | None]
    open_device: Callable[[], Device]


def this_machine() -> Hardware:
    """The machine that this process runs on."""
    return Hardware(gpu_status(), load_library, CudaDevice)
