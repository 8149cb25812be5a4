"""Stand-ins for NVIDIA's Python module and for a GPU's memory, which run engines' graphs in ONNX Runtime.

An "engine" is JSON: the graph that it stands for, its profiles, and a factor that makes its numbers wrong. Device
memory starts as NaN and nothing happens before `FakeDevice.synchronize`, so that memory that was not cleared, and
results that were not waited for, show. Names are those of tensorrt_rtx 1.7 (test_engine.py compares them).
"""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from vlmexport.engines import EngineSpec
from vlmexport.runtime.sessions import NUMPY_TYPES, SessionSettings, open_session
from vlmexport.runtime.tensorrt.bindings import Hardware, Library
from vlmexport.runtime.tensorrt.cuda import CudaError, GpuStatus

GPU = GpuStatus("NVIDIA A100-SXM4-80GB", "8.0", 80 << 30)
VERSION = "1.7.1.116"
_TYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "bool": "BOOL", "float64": "FP8"}


class FakeDevice:
    """Memory of the host, filled with NaN; work is done when it is waited for. `room`: bytes that there are."""

    streams: ClassVar[dict[int, FakeDevice]] = {}

    def __init__(self, room: int = 1 << 30) -> None:
        self.memory: dict[int, Any] = {}
        self.room = room
        self.waiting: list[Any] = []
        self.stream = 1000 + len(self.streams)
        self.streams[self.stream] = self

    def allocate(self, size: int) -> int:
        if sum(m.nbytes for m in self.memory.values()) + size > self.room:
            raise CudaError("CUDA driver: cuMemAlloc_v2 failed with error 2 (out of memory)")
        memory = np.full(size, 0xFF, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        del self.memory[address]

    def at(self, address: int, size: int) -> Any:
        memory = self.memory[address]
        assert size <= memory.nbytes, f"{size} bytes at an address of {memory.nbytes}"
        return memory[:size]

    def zero(self, address: int, size: int) -> None:
        self.waiting.append(lambda: self.at(address, size).fill(0))

    def upload(self, address: int, array: Any) -> None:
        assert array.flags.c_contiguous
        source = array.copy()
        self.waiting.append(lambda: ctypes.memmove(address, source.ctypes.data, len(self.at(address, source.nbytes))))

    def download(self, array: Any, address: int) -> None:
        assert array.flags.c_contiguous
        self.waiting.append(lambda: ctypes.memmove(array.ctypes.data, address, len(self.at(address, array.nbytes))))

    def synchronize(self) -> None:
        work, self.waiting = self.waiting, []
        for do in work:
            do()


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, blob: bytes) -> Any:
        try:
            return ICudaEngine(json.loads(blob), self._logger)
        except json.JSONDecodeError:
            self._logger.log(ILogger.INFO, "Loaded engine size: 0 MiB")
            self._logger.log(ILogger.ERROR, "Serialization assertion header.magicTag failed.")
            self._logger.log(ILogger.ERROR, "cudaError 35")
            return None


class ICudaEngine:
    num_io_tensors: int
    num_optimization_profiles: int

    def __init__(self, data: dict[str, Any], logger: Any) -> None:
        self._data, self._logger = data, logger
        self._session = open_session(Path(data["graph"]), "fake", SessionSettings(1, exact=True))
        self._profiles = EngineSpec.from_dict(data["spec"]).profiles
        self._ins = {i.name: i for i in self._session.get_inputs()}
        self._outs = {o.name: o for o in self._session.get_outputs()}
        self._tensors = self._ins | self._outs
        self._used: set[int] = set()
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in self._ins else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[NUMPY_TYPES[self._tensors[name].type].name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> str:
        return TensorLocation.HOST if name in self._data.get("host", []) else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        return list(self._profiles[profile].shapes[name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        alias = self._data.get("alias", {}).get(name)
        return alias or (name.replace("present", "past_key_values") if name.startswith("present.") else None)

    def create_runtime_config(self) -> Any:
        return IRuntimeConfig()

    def create_execution_context(self, how: Any) -> Any:
        self._data.setdefault("contexts", []).append(how)
        return None if self._data.get("no_context") else IExecutionContext(self)


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE

    def create_runtime_cache(self) -> Any:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class IRuntimeCache:
    read: ClassVar[list[bytes]] = []

    def serialize(self) -> bytes:
        return b"kernels"

    def deserialize(self, blob: bytes) -> bool:
        self.read.append(blob)
        return blob == b"kernels"


class IExecutionContext:
    active_optimization_profile: int

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.active_optimization_profile = -1 if engine._used else 0
        engine._used.add(self.active_optimization_profile)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if profile >= len(self._engine._profiles) or (profile in self._engine._used):
            return False
        self._engine._used -= {self.active_optimization_profile}
        self._engine._used.add(profile)
        self.active_optimization_profile = profile
        self._shapes.clear()
        return stream in FakeDevice.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._profiles[self.active_optimization_profile].shapes[name]
        if not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            return self._error(f"{name} {shape} is outside of the profile")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine._tensors

    def infer_shapes(self) -> list[str]:
        return sorted(self._engine._ins.keys() - self._shapes.keys())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        sizes = {
            d: s for i, shape in self._shapes.items() for d, s in zip(self._engine._ins[i].shape, shape, strict=True)
        }
        if self._engine._data.get("shapes_by_running"):
            zeros = {n: np.zeros(s, NUMPY_TYPES[self._engine._ins[n].type]) for n, s in self._shapes.items()}
            return tuple(self._engine._session.run([name], zeros)[0].shape)
        return tuple(d if isinstance(d, int) else sizes.get(d, -1) for d in self._engine._outs[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        device = FakeDevice.streams[stream]
        if missing := sorted(self._engine._tensors.keys() - self._addresses.keys()):
            return self._error(f"no address for {missing}")
        for name in self._engine._outs:
            alias = self._engine.get_aliased_input_tensor(name)
            if alias and self._addresses[name] != self._addresses[alias]:
                return self._error(f"{name} must have the address of {alias}")
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        device.waiting.append(lambda: self._compute(device, addresses, shapes))
        return True

    def _compute(self, device: FakeDevice, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        feed = {}
        for name, spec in self._engine._ins.items():
            kind = NUMPY_TYPES[spec.type]
            size = math.prod(shapes[name]) * kind.itemsize
            if self._engine.get_tensor_location(name) == TensorLocation.HOST:
                raw = np.frombuffer(ctypes.string_at(addresses[name], size), np.uint8)
            else:
                raw = device.at(addresses[name], size)
            feed[name] = raw.view(kind).reshape(shapes[name]).copy()
        names = list(self._engine._outs)
        for name, value in zip(names, self._engine._session.run(names, feed), strict=True):
            if not name.startswith("present.") and self._is_wrong(len(feed.get("write_indices", [0]))):
                value = value * value.dtype.type(self._engine._data.get("factor", 1.0))
            device.at(addresses[name], value.nbytes)[:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)

    def _is_wrong(self, rows: int) -> bool:
        """Engines may be wrong in one profile only, or from so many rows on."""
        data = self._engine._data
        profile = data.get("wrong_profile", self.active_optimization_profile)
        return profile == self.active_optimization_profile and rows >= data.get("wrong_rows", 0)

    def _error(self, words: str) -> bool:
        self._engine._logger.log(ILogger.ERROR, words)
        return False


class TensorIOMode:
    INPUT, OUTPUT = "in", "out"


class TensorLocation:
    DEVICE, HOST = "device", "host"


class ExecutionContextAllocationStrategy:
    STATIC, ON_PROFILE_CHANGE = "static", "on profile change"


MODULE = SimpleNamespace(
    ILogger=ILogger,
    Runtime=Runtime,
    ICudaEngine=ICudaEngine,
    IRuntimeConfig=IRuntimeConfig,
    IRuntimeCache=IRuntimeCache,
    IExecutionContext=IExecutionContext,
    TensorIOMode=TensorIOMode,
    TensorLocation=TensorLocation,
    ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
)


def machine(gpu: GpuStatus = GPU, *, version: str = VERSION, device: FakeDevice | None = None) -> Hardware:
    """A machine with `gpu` and TensorRT for RTX `version` (empty: none)."""
    library = Library("rtx", version, MODULE) if version else None
    return Hardware(gpu, lambda flavour: library if flavour == "rtx" else None, lambda: device or FakeDevice())


def engine_bytes(graph: Any, spec: EngineSpec, **more: Any) -> bytes:
    """What the stand-in loads as an engine of the graph at the path `graph`."""
    return json.dumps({"graph": str(graph), "spec": spec.to_dict(), **more}).encode()


__all__ = ["GPU", "MODULE", "VERSION", "FakeDevice", "engine_bytes", "machine"]
