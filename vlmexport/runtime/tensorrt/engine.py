"""`Engine`: one serialized engine, checked against its sidecar, run with numpy arrays in and out.

Calls follow NVIDIA's Python API of TensorRT 11 and TensorRT for RTX 1.7 (``help(tensorrt_rtx)``). Never run on a GPU:
see the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from vlmexport.engines import MODULES, Dims, Sidecar, check_sidecar
from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.runtime.protocol import Array, PartOutputError
from vlmexport.runtime.tensorrt.bindings import Hardware, Library
from vlmexport.runtime.tensorrt.cuda import CudaError, Device, DeviceBuffer, host_address

Residents: TypeAlias = Mapping[str, "Resident"]
_NUMPY: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Resident:
    """A tensor that stays on the device: where it lies, and its shape."""

    buffer: DeviceBuffer
    shape: Dims


def checked_library(path: Path, graph: Path | None, hardware: Hardware) -> tuple[Library, Sidecar]:
    """The module that loads the engine at `path` here, and its sidecar, which was checked.

    Raises `ArtifactError` where the engine is of another GPU, version or graph or was changed, `NotPossibleHereError`
    where there is no GPU or the module is not installed.
    """
    if not hardware.gpu.present:
        raise NotPossibleHereError(hardware.gpu.reason)
    if not path.is_file():
        raise ArtifactError(f"there is no engine {path}")
    wanted = Sidecar.read(path)
    library = hardware.library(wanted.flavour)
    if library is None:
        module = MODULES[wanted.flavour].replace("_", "-")
        raise NotPossibleHereError(
            f"{path.name} needs the Python module of its library: pip install {module}=={wanted.version}"
        )
    sidecar = check_sidecar(
        path,
        flavour=library.flavour,
        version=library.version,
        compute_capability=hardware.gpu.compute_capability,
        graph=graph,
        gpu=hardware.gpu.name,
    )
    return library, sidecar


class Engine:
    """A loaded engine of `part` on `device`; one execution context for each optimization profile, made when first used.

    The caller has checked its sidecar (`checked_library`). `kernels_file`: where TensorRT for RTX keeps the kernels
    that it compiles at the first runs; read now, written by `keep_kernels`. Raises `PartOutputError` when the library
    does not take the file.
    """

    def __init__(
        self, part: str, path: Path, library: Library, device: Device, *, kernels_file: Path | None = None
    ) -> None:
        self.part = part
        self._module = library.module
        self._device = device
        self._log = _make_log(library.module)
        self._kernels_file = kernels_file
        self._kernels: Any = None
        self._contexts: dict[int, Any] = {}
        self._buffers: dict[str, DeviceBuffer] = {}
        with self._errors(f"{path.name} does not load"):
            self._runtime = library.module.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            self._require(self._engine is not None, f"{path.name} does not load")
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            is_input = {n: self._engine.get_tensor_mode(n) == library.module.TensorIOMode.INPUT for n in names}
            self.inputs = tuple(n for n in names if is_input[n])
            self.outputs = tuple(n for n in names if not is_input[n])
            self._types = {n: self._numpy_type(n) for n in names}
            profiles = range(self._engine.num_optimization_profiles)
            self._ranges = {(n, p): self._read_range(n, p) for n in self.inputs for p in profiles}
            if library.flavour == "rtx":
                self._config = self._runtime_config()

    def range_of(self, name: str, profile: int) -> tuple[Dims, Dims]:
        """The smallest and the largest shape of an input in a profile."""
        if (name, profile) not in self._ranges:
            raise PartOutputError(self.part, f"the engine has no input {name!r} in an optimization profile {profile}")
        return self._ranges[name, profile]

    def shape_of(self, name: str) -> Dims:
        """The shape of a tensor as built; -1 for a dynamic axis."""
        return tuple(self._engine.get_tensor_shape(name))

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor."""
        return self._types[name]

    def alias_of(self, output: str) -> str:
        """The input in whose memory the engine writes `output`; empty where it has memory of its own."""
        return self._engine.get_aliased_input_tensor(output) or ""

    def run(
        self, inputs: Mapping[str, Array], profile: int = 0, residents: Residents | None = None
    ) -> dict[str, Array]:
        """Run once and wait: the outputs that are not among `residents`.

        `inputs` are converted to the engine's dtypes. `residents`: tensors of either side that lie on the device
        already, by name; two names may share a buffer. Raises `BadInputError` for a shape outside of the profile,
        `PartOutputError` for everything that the library or the driver refuses.
        """
        held = residents or {}
        missing = sorted(set(self.inputs) - inputs.keys() - held.keys())
        if missing:
            raise PartOutputError(self.part, f"the engine needs the inputs {missing}; given were {sorted(inputs)}")
        arrays = {n: np.asarray(inputs[n], self._types[n], order="C") for n in self.inputs if n not in held}
        shapes = {n: held[n].shape if n in held else arrays[n].shape for n in self.inputs}
        self._check_shapes(shapes, profile)
        with self._errors("does not run"):
            context = self._context(profile)
            for name, shape in shapes.items():
                self._require(context.set_input_shape(name, shape), f"the shape {list(shape)} of {name} is refused")
            for name, resident in held.items():
                self._bind(context, name, resident.buffer.address)
            for name, array in arrays.items():
                self._bind(context, name, self._place_input(name, array))
            results = self._results(context, held)
            self._require(context.execute_async_v3(self._device.stream), "the engine does not run")
            for name, array in results.items():
                self._device.download(array, self._buffers[name].address)
            self._device.synchronize()
        return results

    def keep_kernels(self) -> None:
        """Write the kernels that TensorRT for RTX compiled so far to `kernels_file`; nothing for TensorRT."""
        if self._kernels is None or self._kernels_file is None:
            return
        self._kernels_file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._kernels_file.with_name(f".{self._kernels_file.name}.new")
        draft.write_bytes(bytes(memoryview(self._kernels.serialize())))
        draft.replace(self._kernels_file)

    def _check_shapes(self, shapes: Mapping[str, Dims], profile: int) -> None:
        for name, shape in shapes.items():
            low, high = self.range_of(name, profile)
            fits = len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
            if not fits:
                raise BadInputError(
                    f"{self.part}: {name} has shape {list(shape)}; the engine was built for {list(low)} to {list(high)}"
                )

    def _results(self, context: Any, held: Residents) -> dict[str, Array]:
        """Host arrays for the outputs, whose device memory is bound; sizes are known once all inputs are."""
        unknown = context.infer_shapes()
        self._require(not unknown, f"the shapes of {unknown} are not known")
        results: dict[str, Array] = {}
        for name in self.outputs:
            if name in held:
                continue
            shape = tuple(context.get_tensor_shape(name))
            self._require(all(size >= 0 for size in shape), f"{name} has the shape {list(shape)} before it is computed")
            results[name] = np.empty(shape, self._types[name])
            self._bind(context, name, self._buffer(name, results[name].nbytes).address)
        return results

    def _place_input(self, name: str, array: Array) -> int:
        """Where the engine finds an input: few that only shapes depend on must lie in the host's memory."""
        if self._engine.get_tensor_location(name) == self._module.TensorLocation.HOST:
            return host_address(array)
        buffer = self._buffer(name, array.nbytes)
        self._device.upload(buffer.address, array)
        return buffer.address

    def _buffer(self, name: str, size: int) -> DeviceBuffer:
        """Memory for one input or output, kept between runs and made anew when it is too small."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers.pop(name, None)
            self._buffers[name] = DeviceBuffer(self._device, size)
        return self._buffers[name]

    def _bind(self, context: Any, name: str, address: int) -> None:
        self._require(context.set_tensor_address(name, address), f"the memory of {name} is refused")

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            context = self._new_context()
            self._require(context is not None, "there is no execution context (is the GPU's memory full?)")
            if context.active_optimization_profile != profile:
                chosen = context.set_optimization_profile_async(profile, self._device.stream)
                self._require(chosen, f"the optimization profile {profile} is refused")
                self._device.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _new_context(self) -> Any:
        """A context that takes the memory of its own profile only."""
        if self._kernels is not None:
            return self._engine.create_execution_context(self._config)
        return self._engine.create_execution_context(self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)

    def _runtime_config(self) -> Any:
        """What TensorRT for RTX's contexts share: the kernels that were compiled for them on this GPU.

        A file of another GPU, driver or version is refused by the library, and written anew.
        """
        config = self._engine.create_runtime_config()
        strategy = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        config.set_execution_context_allocation_strategy(strategy)
        self._kernels = config.create_runtime_cache()
        if self._kernels_file is not None and self._kernels_file.is_file():
            self._kernels.deserialize(self._kernels_file.read_bytes())
        self._require(config.set_runtime_cache(self._kernels), "the cache of compiled kernels is refused")
        return config

    def _read_range(self, name: str, profile: int) -> tuple[Dims, Dims]:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(smallest), tuple(largest)

    def _numpy_type(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        self._require(kind in _NUMPY, f"{name} has the type {kind}, which numpy has not")
        return np.dtype(_NUMPY[kind])

    def _require(self, good: bool, problem: str) -> None:
        """Raise `PartOutputError` with the library's own first error line unless `good`."""
        if not good:
            raise PartOutputError(self.part, problem + self._said())

    def _said(self) -> str:
        first = next(iter(self._log.errors), "")
        return f": {first}" if first else ""

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn errors of the library (RuntimeError, TypeError) and the driver into `PartOutputError` of the part."""
        self._log.errors.clear()
        try:
            yield
        except (CudaError, RuntimeError, TypeError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PartOutputError(self.part, f"{what}: {line}{self._said()}") from error


def _make_log(module: Any) -> Any:
    """A logger of the module that keeps the lines of errors, the first of which names the cause."""

    def start(self: Any) -> None:
        module.ILogger.__init__(self)
        self.errors = []

    def log(self: Any, severity: Any, message: str) -> None:
        if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
            self.errors.append(" ".join(message.split()))

    return type("Log", (module.ILogger,), {"__init__": start, "log": log})()
