"""Triton model ``decoder`` for TensorRT: the engine with its KV cache, which it updates in place.

TensorRT writes the cache into the memory that it reads it from: past and present must be one address. Triton's own
TensorRT backend gives every tensor memory of its own, so this model runs the engine itself, through TensorRT's Python
module and the CUDA driver, and keeps the cache of the sequence that Triton has routed to it. What is in the cache from
an earlier sequence is never seen: a token sees the slots up to its own, and those were written by its own sequence.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

FED = ("inputs_embeds", "write_indices", "logits_positions")


class TritonPythonModel:
    """The name and the methods that Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engines; ``parameters.calls`` names file and optimization profile of prefill and of decode."""
        config = json.loads(args["model_config"])
        calls = json.loads(config["parameters"]["calls"]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.cuda = Cuda(int(args["model_instance_device_id"]))
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engines = {file: self._load(folder / file) for file, _ in calls.values()}
        self.contexts = {name: self._context(*place) for name, place in calls.items()}
        engine = next(iter(self.engines.values()))
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        pasts = [name for name in names if name.startswith("past_key_values.")]
        self.caches = {name: self._cache(engine, name) for name in pasts}
        self.vocab = engine.get_tensor_shape("logits")[-1]
        self.rooms: dict[str, tuple[int, int]] = {}

    def _load(self, path: Path) -> Any:
        engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise pb_utils.TritonModelException(f"{path} is not an engine of TensorRT {trt.__version__} for this GPU")
        return engine

    def _context(self, file: str, profile: int) -> Any:
        context = self.engines[file].create_execution_context()
        if context.active_optimization_profile != profile:
            if not context.set_optimization_profile_async(profile, self.cuda.stream):
                raise pb_utils.TritonModelException(f"{file} has no optimization profile {profile}")
            self.cuda.synchronize()
        return context

    def _cache(self, engine: Any, name: str) -> int:
        """The address of zeros for one sequence: what is not a number would be seen even with a weight of 0."""
        _, *shape = engine.get_tensor_shape(name)
        width = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).itemsize
        address = self.cuda.allocate(int(np.prod(shape) * width))
        self.cuda.zero(address, int(np.prod(shape) * width))
        return address

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        fed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in FED}
        logits = self._run({name: np.ascontiguousarray(value) for name, value in fed.items()})
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("logits", logits)])

    def _run(self, fed: dict[str, Any]) -> Any:
        """Logits float32 ``[1, kept, vocab]`` of one call on the cache."""
        context = self.contexts["decode" if fed["inputs_embeds"].shape[1] == 1 else "prefill"]
        logits = np.empty((*fed["logits_positions"].shape, self.vocab), np.float32)
        for name, value in fed.items():
            address = self._room(name, value.nbytes)
            self.cuda.upload(address, value)
            context.set_input_shape(name, value.shape)
            context.set_tensor_address(name, address)
        for name, address in self.caches.items():
            context.set_input_shape(name, (1, *context.engine.get_tensor_shape(name)[1:]))
            context.set_tensor_address(name, address)
            context.set_tensor_address(name.replace("past_key_values.", "present."), address)
        context.set_tensor_address("logits", self._room("logits", logits.nbytes))
        if not context.execute_async_v3(self.cuda.stream):
            raise pb_utils.TritonModelException("TensorRT did not run the decoder; the server's log says why")
        self.cuda.download(logits, self.rooms["logits"][0])
        self.cuda.synchronize()
        return logits

    def _room(self, name: str, size: int) -> int:
        """The address of `size` bytes for a tensor; kept, and replaced when more is needed."""
        address, held = self.rooms.get(name, (0, 0))
        if held < size:
            if held:
                self.cuda.free(address)
            self.rooms[name] = (self.cuda.allocate(size), size)
        return self.rooms[name][0]


class Cuda:
    """Memory and one stream of GPU `number`, by the CUDA driver's own library."""

    def __init__(self, number: int) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        self.stream = stream.value

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Give the bytes at `address` back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def zero(self, address: int, size: int) -> None:
        """Set `size` bytes to 0."""
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(size))

    def upload(self, address: int, array: Any) -> None:
        """Copy a contiguous array to the GPU."""
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), size)

    def download(self, array: Any, address: int) -> None:
        """Fill a contiguous array from the GPU, after what the stream has to do."""
        self.synchronize()
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), size)

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self.library, name)(*arguments)
        if result != 0:
            raise pb_utils.TritonModelException(f"{name} failed with CUDA error {result}")
