"""What works on this machine: targets, runtimes, accelerators and extras, with the fix for what does not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Any

from vlmexport.cpu import cpu_flags, int8_gain
from vlmexport.errors import NotPossibleHereError
from vlmexport.target import Target, load_target, target_names

# Instruction sets that decide how fast quantized products run on a CPU, as Linux spells them.
_CPU_FLAGS = {
    "avx2": "fast FP32 products",
    "avx512_vnni": "fast INT8 products for accuracy level 4",
    "avx_vnni": "fast INT8 products for accuracy level 4",
    "amx_int8": "INT8 matrix unit",
    "amx_bf16": "BF16 matrix unit",
    "asimddp": "fast INT8 products (Arm)",
}
_CORE = ("torch", "transformers", "onnx", "onnxruntime", "safetensors", "numpy", "pillow", "gguf")
# extra: (a module that comes with it, what it is for)
_EXTRAS = {
    "gpu": ("onnxruntime", "ONNX Runtime on NVIDIA GPUs"),
    "gguf": ("xllamacpp", "llama.cpp: K-quants, and the proof of GGUF exports"),
    "rtx": ("tensorrt_rtx", "TensorRT for RTX: engines without a GPU"),
    "dev": ("pytest", "tests and checks"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that works or not; `fix` is a line to type, empty when nothing needs fixing or nothing can."""

    kind: str
    name: str
    works: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All findings, in the order of their kinds."""

    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON data."""
        return {"findings": [dataclasses.asdict(f) for f in self.findings]}


def examine() -> DoctorReport:
    """Look at this machine; never raises for something missing."""
    providers = onnxruntime_providers()
    findings = [_package(name) for name in _CORE]
    findings += [_target(load_target(name), providers) for name in target_names()]
    findings += [_torch_accelerator(), *_cpu()]
    findings += [_extra(name, *_EXTRAS[name], providers) for name in sorted(_EXTRAS)]
    return DoctorReport(tuple(findings))


def onnxruntime_providers() -> tuple[str, ...]:
    """The execution providers that the installed ONNX Runtime was built with; empty when it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def provider_runs(provider: str) -> bool:
    """True when ONNX Runtime computes something with `provider`; that it was built with it does not say so."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    product = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "probe", [value], [product])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a missing driver is told by us, in one line
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if provider not in session.get_providers():  # ONNX Runtime falls back to the CPU without an error
        return False
    two = 2 * np.eye(2, dtype=np.float32)
    return bool(np.array_equal(session.run(None, {"x": two})[0], two @ two))


def _package(name: str) -> Finding:
    try:
        return Finding("packages", name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", name, False, "not installed", "pip install vlmexport")


def _target(target: Target, providers: tuple[str, ...]) -> Finding:
    if target.onnx_settings is None:
        return _llama_cpp(target)
    if target.runtime == "tensorrt":
        return _tensorrt(target)
    if target.provider not in providers:
        have = ", ".join(providers) or "no ONNX Runtime"
        detail = f"exports can be made here; running them needs {target.provider}, ONNX Runtime has {have}"
    elif provider_runs(target.provider):
        return Finding("targets", target.name, True, target.description)
    else:
        detail = f"exports can be made here; ONNX Runtime has {target.provider}, but it finds no device or driver"
    return Finding("targets", target.name, False, detail, provider_fix(target.provider))


def _llama_cpp(target: Target) -> Finding:
    if missing := _without_llama_cpp():
        return Finding("targets", target.name, False, missing, "pip install 'vlmexport[gguf]'")
    return Finding("targets", target.name, True, target.description)


def _tensorrt(target: Target) -> Finding:
    """Graphs can be made and judged anywhere; engines run only on a GPU, with their own library."""
    from vlmexport.engines import LIBRARIES
    from vlmexport.runtime.tensorrt.bindings import installed_flavours
    from vlmexport.runtime.tensorrt.cuda import gpu_status

    status, found = gpu_status(), installed_flavours()
    have = ", ".join(f"{LIBRARIES[flavour]} {version}" for flavour, version in found.items()) or "no TensorRT"
    device = f"{status.name}, {status.compute_capability}" if status.present else status.reason
    works = bool(found) and status.present
    detail = f"exports can be made and judged here; engines run where the GPU is ({have}; {device})"
    elsewhere = "copy an export to the machine with the GPU and run `vlmexport verify DIR` there"
    fix = elsewhere if found else "pip install 'vlmexport[rtx]'"
    return Finding("targets", target.name, works, detail, "" if works else fix)


def _without_llama_cpp() -> str:
    """Why llama.cpp cannot be called here; empty when the pinned version is installed."""
    from vlmexport.quantize.ggml.library import require_library

    try:
        require_library()
    except NotPossibleHereError as error:
        return str(error)
    return ""


def provider_fix(provider: str) -> str:
    """The line to type so that ONNX Runtime gets `provider`; empty when there is none."""
    if provider == "CUDAExecutionProvider":
        # Both wheels own the same module, so the GPU one has to be written last.
        return "pip install 'vlmexport[gpu]' && pip install --force-reinstall --no-deps 'onnxruntime-gpu>=1.31,<1.32'"
    return "pip install onnxruntime" if provider == "CPUExecutionProvider" else ""


def _torch_accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("accelerators", "cuda", True, torch.cuda.get_device_name(0))
    if torch.backends.mps.is_available():
        return Finding("accelerators", "mps", True, "Apple GPU")
    reason = "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch sees no NVIDIA GPU"
    return Finding("accelerators", "cuda", False, f"{reason}; everything here works on the CPU")


def _cpu() -> list[Finding]:
    flags = cpu_flags()
    name = f"{platform.machine()}, {_cores()} cores"
    findings = [Finding("accelerators", "cpu", True, name)]
    present = [Finding("accelerators", f, True, text) for f, text in _CPU_FLAGS.items() if f in flags]
    gains, reason = int8_gain(flags)
    verdict = {True: "gains here", False: "does not run here", None: "may gain here"}[gains]
    prompts = Finding("accelerators", "--prefill int8", gains is not False, f"{verdict}: {reason}")
    return [*findings, *present, prompts]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extra(name: str, module: str, purpose: str, providers: tuple[str, ...]) -> Finding:
    if name == "gpu":
        works = "CUDAExecutionProvider" in providers and provider_runs("CUDAExecutionProvider")
        return Finding("extras", name, works, purpose, "" if works else provider_fix("CUDAExecutionProvider"))
    works = not _without_llama_cpp() if name == "gguf" else importlib.util.find_spec(module) is not None
    return Finding("extras", name, works, purpose, "" if works else f"pip install 'vlmexport[{name}]'")
