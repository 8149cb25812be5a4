"""ONNX Runtime sessions of single parts: opened with the right options, called with checked inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from vlmexport.errors import NotPossibleHereError
from vlmexport.runtime.float_products import with_float_products
from vlmexport.runtime.protocol import Array, PartOutputError

CPU_PROVIDER = "CPUExecutionProvider"

NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(bool)": np.dtype(np.bool_),
}

# onnxruntime's errors have no common base class below Exception.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class SessionSettings:
    """How sessions are opened.

    `threads`: intra-op threads, 0 = onnxruntime's choice. `exact`: quantized products without rounding their
    activations to 8 bits, which isolates lowering errors. `provider`: execution provider; the CPU one is always the
    fallback for single operators. `float_cache`: a quantized KV cache is kept as floats instead, for the same reason.
    `watch`: values inside the graph that become outputs, too.
    `rests`: threads stop waiting for work as soon as a run ends, for a session beside one that is called at every step.
    """

    threads: int = 0
    exact: bool = False
    provider: str = CPU_PROVIDER
    float_cache: bool = False
    rests: bool = False
    watch: tuple[str, ...] = ()


def require_provider(provider: str) -> None:
    """Raise `NotPossibleHereError` when onnxruntime has no `provider` here."""
    available = ort.get_available_providers()
    if provider not in available:
        raise NotPossibleHereError(f"onnxruntime has no {provider} here; it has {', '.join(available)}")


def open_session(path: Path, part: str, settings: SessionSettings) -> ort.InferenceSession:
    """Open the graph of `part`; raises `PartOutputError` naming it when onnxruntime refuses the file."""
    require_provider(settings.provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if settings.rests:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if settings.exact:
        options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    providers = list(dict.fromkeys([settings.provider, CPU_PROVIDER]))
    with part_errors(part, f"{path.name} does not load"):
        model: str | bytes = str(path)
        if settings.exact or settings.float_cache or settings.watch:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            model = _changed_model(path, settings)
        return ort.InferenceSession(model, options, providers=providers)


def _changed_model(path: Path, settings: SessionSettings) -> bytes:
    """The graph without the roundings that `settings` exclude, and with the outputs that they ask for."""
    import onnx

    from vlmexport.runtime.float_cache import with_float_cache

    model = onnx.load(path, load_external_data=False)
    if settings.exact:
        _make_exact(model)
    if settings.float_cache:
        with_float_cache(model)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in settings.watch)
    data: bytes = model.SerializeToString()
    return data


def _make_exact(model: Any) -> None:
    """Take the rounding of activations out of the ModelProto.

    INT8 products become float ones, and every MatMulNBits, those of experts' branches too, gets accuracy level 0:
    force_fp32 alone reaches only the 4-bit kernels.
    """
    with_float_products(model)
    for node in _nodes(model.graph):
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a GraphProto and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


@contextmanager
def part_errors(part: str, what: str) -> Iterator[None]:
    """Turn onnxruntime's errors into `PartOutputError` that names the part; only the first line is kept."""
    try:
        yield
    except _ORT_ERRORS as error:
        raise PartOutputError(part, f"{what}: {str(error).splitlines()[0]}") from error


class PartSession:
    """One small part (everything but the decoder): named arrays in, its named outputs checked and returned."""

    def __init__(self, path: Path, part: str, settings: SessionSettings, *outputs: str) -> None:
        self.part = part
        self.outputs = list(outputs)
        self.session = open_session(path, part, settings)
        self.input_types = {i.name: NUMPY_TYPES[i.type] for i in self.session.get_inputs()}
        require_outputs(self.session, part, self.outputs)

    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        """The first output of `run`."""
        return self.run(inputs)[0]

    def run(self, inputs: Mapping[str, Array]) -> tuple[Array, ...]:
        """Run on `inputs` (converted to the graph's dtypes, unknown names left out) and return the checked outputs."""
        missing = sorted(self.input_types.keys() - inputs.keys())
        if missing:
            raise PartOutputError(self.part, f"the graph needs the inputs {missing}; given were {sorted(inputs)}")
        feed = {name: np.ascontiguousarray(inputs[name], dtype) for name, dtype in self.input_types.items()}
        with part_errors(self.part, "does not run"):
            results: list[Array] = self.session.run(self.outputs, feed)
        return tuple(checked(self.part, name, value) for name, value in zip(self.outputs, results, strict=True))


def require_outputs(session: ort.InferenceSession, part: str, names: list[str]) -> None:
    """Raise `PartOutputError` when the graph lacks one of the outputs `names`."""
    have = [o.name for o in session.get_outputs()]
    missing = [name for name in names if name not in have]
    if missing:
        raise PartOutputError(part, f"the graph has no output {missing[0]!r}; it has {have[:4]}")


def checked(part: str, name: str, value: Array, shape: tuple[int | None, ...] | None = None) -> Array:
    """Return `value` unless it is empty, not finite or not of `shape` (None = any size): then `PartOutputError`."""
    if value.size == 0:
        raise PartOutputError(part, f"{name} is empty, shape {value.shape}")
    if shape is not None and not _fits(value.shape, shape):
        raise PartOutputError(part, f"{name} has shape {value.shape}, expected {shape}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        raise PartOutputError(part, f"{name} has {bad} of {value.size} values that are NaN or infinite")
    return value


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))
