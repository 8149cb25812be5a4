"""A stand-in for a Triton server: it reads a model repository and runs it in this process.

ONNX files run in ONNX Runtime, plans are the engines of `tests.runtime.tensorrt.fakes`, Python models are loaded from
the repository with a `triton_python_backend_utils` of its own. Requests are checked as Triton checks them: names, types
and dims of ``config.pbtxt``, and one sequence at a time for each model that batches sequences.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format

from tests.runtime.tensorrt import fakes
from vlmexport.lower.tensorrt.triton_config import TYPES, described, read_config

START, END = 1, 2
_NUMPY = {name: np.dtype(kind) for kind, (name, _) in TYPES.items()}


class TritonModelException(Exception):  # noqa: N818 - Triton's name
    pass


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class Server:
    """The repository in `root`; `calls` are the models that ran, with their flags."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, int]] = []
        self.running: dict[str, int] = {}
        self.configs = {
            path.parent.name: read_config(path.read_text(), str(path)) for path in sorted(root.glob("*/config.pbtxt"))
        }
        self._runners: dict[str, Any] = {}

    def ask(self, model: str, **arrays: Any) -> dict[str, Any]:
        """Run `model` as a client does; raises `TritonModelException` with the server's error."""
        outputs = [tensor.name for tensor in self.configs[model].output]
        response = self.run(model, [Tensor(n, a) for n, a in arrays.items()], outputs)
        if response.has_error():
            raise TritonModelException(response.error().message())
        return {t.name(): t.as_numpy() for t in response.output_tensors()}

    def run(self, model: str, inputs: list[Tensor], outputs: list[str], sequence: int = 0, flags: int = 0) -> Any:
        config = self.configs[model]
        try:
            self._check(config.input, {t.name(): t.as_numpy() for t in inputs})
            if config.HasField("sequence_batching"):
                self._route(model, sequence, flags)
            self.calls.append((model, flags))
            made = self._execute(model, config, inputs, outputs)
        except TritonModelException as error:
            return InferenceResponse([], TritonError(str(error)))
        if made.has_error():
            return made
        known = described(config.output)
        for tensor in made.output_tensors():
            kind, dims = known[tensor.name()]
            assert _agrees(tensor.as_numpy(), kind, dims), f"{model}: {tensor.name()} {tensor.as_numpy().shape}"
        return InferenceResponse([t for t in made.output_tensors() if t.name() in outputs])

    def _check(self, tensors: Any, given: dict[str, Any]) -> None:
        known = described(tensors)
        optional = {t.name for t in tensors if t.optional}
        if missing := sorted(known.keys() - given.keys() - optional):
            raise TritonModelException(f"expected the inputs {missing}")
        for name, array in given.items():
            if name not in known or not _agrees(array, *known[name]):
                raise TritonModelException(f"unexpected input {name}: {array.dtype} {array.shape}, {known.get(name)}")

    def _route(self, model: str, sequence: int, flags: int) -> None:
        if not sequence:
            raise TritonModelException(f"{model}: a request must have a correlation id")
        if flags & START:
            if model in self.running:
                raise TritonModelException(f"{model}: its only instance works on another sequence")
            self.running[model] = sequence
        if self.running.get(model) != sequence:
            raise TritonModelException(f"{model}: the sequence {sequence} was not started")
        if flags & END:
            del self.running[model]

    def _execute(self, model: str, config: Any, inputs: list[Tensor], outputs: list[str]) -> Any:
        if config.platform == "ensemble":
            return self._ensemble(config, inputs)
        if config.backend == "python":
            return self._python(model, config).execute([SimpleNamespace(tensors=inputs)])[0]
        session = self._session(model, config)
        arrays = session.run(outputs, {t.name(): t.as_numpy() for t in inputs})
        return InferenceResponse([Tensor(n, a) for n, a in zip(outputs, arrays, strict=True)])

    def _ensemble(self, config: Any, inputs: list[Tensor]) -> Any:
        held = {t.name(): t.as_numpy() for t in inputs}
        for step in config.ensemble_scheduling.step:
            fed = [Tensor(name, held[inner]) for name, inner in step.input_map.items()]
            response = self.run(step.model_name, fed, list(step.output_map))
            if response.has_error():
                return response
            held.update({step.output_map[t.name()]: t.as_numpy() for t in response.output_tensors()})
        return InferenceResponse([Tensor(t.name, held[t.name]) for t in config.output])

    def _session(self, model: str, config: Any) -> Any:
        if model not in self._runners:
            path = self.root / model / "1" / config.default_model_filename
            if config.platform == "tensorrt_plan":
                path = Path(json.loads(path.read_bytes())["graph"])
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self._runners[model] = onnxruntime.InferenceSession(path, options)
        return self._runners[model]

    def _python(self, model: str, config: Any) -> Any:
        if model not in self._runners:
            with self._modules():
                path = self.root / model / "1" / "model.py"
                spec = importlib.util.spec_from_file_location(f"triton_model_{model}", path)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            if hasattr(module, "Cuda"):
                module.Cuda.__init__ = _open_driver
            made = module.TritonPythonModel()
            made.initialize(
                {
                    "model_config": json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)),
                    "model_repository": str(self.root / model),
                    "model_version": "1",
                    "model_instance_device_id": "0",
                }
            )
            self._runners[model] = made
        return self._runners[model]

    @contextmanager
    def _modules(self) -> Iterator[None]:
        """What ``import`` gives inside the server."""
        utils = ModuleType("triton_python_backend_utils")
        server = self

        class InferenceRequest:
            def __init__(self, **fields: Any) -> None:
                self.fields = fields

            def exec(self) -> Any:
                memory = self.fields["preferred_memory"]
                assert memory.kind == "cpu", "as_numpy would fail on the memory of a GPU"
                return server.run(
                    self.fields["model_name"],
                    self.fields["inputs"],
                    self.fields["requested_output_names"],
                    self.fields.get("correlation_id", 0),
                    self.fields.get("flags", 0),
                )

        found = {
            "Tensor": Tensor,
            "InferenceRequest": InferenceRequest,
            "InferenceResponse": InferenceResponse,
            "TritonError": TritonError,
            "TritonModelException": TritonModelException,
            "PreferredMemory": lambda kind, device: SimpleNamespace(kind=kind, device=device),
            "TRITONSERVER_MEMORY_CPU": "cpu",
            "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START": START,
            "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END": END,
            "get_input_tensor_by_name": lambda request, name: _named(request.tensors, name),
            "get_output_tensor_by_name": lambda response, name: _named(response.output_tensors(), name),
        }
        vars(utils).update(found)
        before = {name: sys.modules.get(name) for name in ("triton_python_backend_utils", "tensorrt")}
        sys.modules.update({"triton_python_backend_utils": utils, "tensorrt": tensorrt_module()})
        try:
            yield
        finally:
            for name, module in before.items():
                sys.modules.pop(name)
                if module is not None:
                    sys.modules[name] = module


def _named(tensors: list[Tensor], name: str) -> Tensor | None:
    return next((t for t in tensors if t.name() == name), None)


def _agrees(array: Any, kind: str, dims: tuple[int, ...]) -> bool:
    sizes = zip(array.shape, dims, strict=False)
    return array.dtype == _NUMPY[kind] and array.ndim == len(dims) and all(d in (-1, s) for s, d in sizes)


def tensorrt_module() -> Any:
    """``tensorrt`` as far as the decoder uses it, over the stand-in's engines."""

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)

    class Context(fakes.IExecutionContext):
        @property
        def engine(self) -> Any:
            return self._engine

    class Engine(fakes.ICudaEngine):
        def create_execution_context(self, how: Any = None) -> Any:
            return Context(self)

    class Runtime(fakes.Runtime):
        def deserialize_cuda_engine(self, blob: bytes) -> Any:
            return Engine(json.loads(blob), self._logger) if blob.startswith(b"{") else None

    module = ModuleType("tensorrt")
    types = {"FLOAT": np.float32, "HALF": np.float16}
    found = {"Logger": Logger, "Runtime": Runtime, "nptype": lambda kind: types[kind.name], "__version__": "11.4.0.106"}
    vars(module).update(found)
    return module


def _open_driver(self: Any, number: int) -> None:
    """``Cuda.__init__`` without a GPU: its library's functions work on a `FakeDevice`."""
    device = fakes.FakeDevice()
    self.stream, self.library, self.device = device.stream, _Driver(device), number


class _Driver:
    """The functions of ``libcuda.so.1`` that the decoder calls after opening; 0 is success."""

    def __init__(self, device: fakes.FakeDevice) -> None:
        self._device = device

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        address._obj.value = self._device.allocate(size.value)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        self._device.free(address.value)
        return 0

    def cuMemsetD8_v2(self, address: Any, value: Any, size: Any) -> int:  # noqa: N802
        self._device.at(address.value, size.value).fill(value.value)
        return 0

    def cuMemcpyHtoD_v2(self, address: Any, source: Any, size: Any) -> int:  # noqa: N802
        ctypes.memmove(self._device.at(address.value, size.value).ctypes.data, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> int:  # noqa: N802
        ctypes.memmove(target.value, self._device.at(address.value, size.value).ctypes.data, size.value)
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        assert stream.value == self._device.stream
        self._device.synchronize()
        return 0
