"""The CUDA driver's library by ctypes: which GPU is here, device memory and one stream. Nothing else of CUDA is needed.

Prototypes follow the CUDA driver API reference (cuda.h, CUDA 13). Never run on a GPU: see the package.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlmexport.errors import NotPossibleHereError, VlmExportError
from vlmexport.runtime.protocol import Array

DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_LONGEST_NAME = 256

# name: arguments; all return a CUresult, 0 for success.
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
}


class CudaError(VlmExportError):
    """A call of the CUDA driver failed; the message names it and has the driver's own words."""


@dataclass(frozen=True)
class GpuStatus:
    """The first CUDA device that this process sees (``CUDA_VISIBLE_DEVICES`` chooses), or why there is none.

    `compute_capability` as ``8.0``, `memory` in bytes; empty and 0 where `reason` says that there is no GPU.
    """

    name: str = ""
    compute_capability: str = ""
    memory: int = 0
    reason: str = ""

    @property
    def present(self) -> bool:
        """Is there a GPU?"""
        return not self.reason


class Device(Protocol):
    """Memory of a GPU by address, and a stream on which everything happens in order.

    `upload`, `download` and `zero` may return before they are done; `synchronize` waits. Errors are `CudaError`.
    """

    @property
    def stream(self) -> int:
        """The handle of the stream."""

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes."""

    def free(self, address: int) -> None:
        """Give the bytes at `address` back."""

    def zero(self, address: int, size: int) -> None:
        """Set `size` bytes to 0."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device; it must live until `synchronize`."""

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the device."""

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""


class DeviceBuffer:
    """`size` bytes on `device`, at `address`, given back when the object goes."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.address = device.allocate(size)
        self.free = weakref.finalize(self, device.free, self.address)


def gpu_status() -> GpuStatus:
    """Which GPU is here; never raises. Only the driver is asked: neither PyTorch nor the CUDA runtime need be here."""
    try:
        driver = _Driver()
        driver.call("cuInit", 0)
        return _describe(driver)
    except (CudaError, NotPossibleHereError) as error:
        return GpuStatus(reason=str(error))


def _describe(driver: _Driver) -> GpuStatus:
    count, device, memory = c_int(), c_int(), c_size_t()
    driver.call("cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        return GpuStatus(reason="there is an NVIDIA driver here, but no GPU that this process may use")
    driver.call("cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(_LONGEST_NAME)
    driver.call("cuDeviceGetName", name, _LONGEST_NAME, device.value)
    driver.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device.value)
    numbers = [driver.attribute(which, device.value) for which in (_MAJOR, _MINOR)]
    return GpuStatus(name.value.decode("utf-8", "replace"), f"{numbers[0]}.{numbers[1]}", int(memory.value))


class _Driver:
    """The driver's library; raises `NotPossibleHereError` where it is not installed or lacks a function."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(DRIVER)
            for name, arguments in _PROTOTYPES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:
            raise NotPossibleHereError(f"there is no NVIDIA GPU driver here: {error}") from error

    def call(self, name: str, *arguments: Any) -> None:
        """Call the function `name`; raises `CudaError` unless it succeeds."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise CudaError(f"CUDA driver: {name} failed with error {code} ({self._words(code)})")

    def attribute(self, which: int, device: int) -> int:
        """A number about a device."""
        value = c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def _words(self, code: int) -> str:
        text = c_char_p()
        known = self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value
        return known.decode("utf-8", "replace") if known else "unknown"


class CudaDevice:
    """The first CUDA device, in its primary context, which TensorRT uses too. Satisfies `Device`.

    The context stays until the process ends: engines and buffers may outlive this object. Raises
    `NotPossibleHereError` without a driver, `CudaError` without a GPU.
    """

    def __init__(self) -> None:
        self._driver = _Driver()
        self._context, stream, device = c_void_p(), c_void_p(), c_int()
        self._driver.call("cuInit", 0)
        self._driver.call("cuDeviceGet", ctypes.byref(device), 0)
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device.value)
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self._stream = int(stream.value or 0)

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return self._stream

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes (at least one), aligned to 256 bytes."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give the bytes at `address` back."""
        self._call("cuMemFree_v2", address)

    def zero(self, address: int, size: int) -> None:
        """Set `size` bytes to 0."""
        self._call("cuMemsetD8Async", address, 0, size, self._stream)

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device; it must live until `synchronize`."""
        self._call("cuMemcpyHtoDAsync_v2", address, host_address(array), array.nbytes, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the device."""
        self._call("cuMemcpyDtoHAsync_v2", host_address(array), address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        # The current context belongs to a thread, and this one may be new.
        self._driver.call("cuCtxSetCurrent", self._context)
        self._driver.call(name, *arguments)


def host_address(array: Array) -> int:
    """Where a contiguous array lies; ValueError for one whose bytes are not in one piece."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {np.shape(array)} is not in one piece")
    return int(array.ctypes.data)
