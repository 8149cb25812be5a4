"""Engines of an export, built where they can be: by TensorRT for RTX ahead of time on a CPU, without any GPU.

`build_engine` makes one, in a process of its own (`worker`); `build_engines` makes those of an export into its library
``engines/``, each with its sidecar. The same code drives TensorRT itself (flavour ``trt``) on a machine that has it and
the GPU it builds for. **That was never run on a real TensorRT**: it cannot be installed from the package index, so only
a stand-in for its module has seen those calls.

Not offered, because they fail in a build without a driver (TensorRT for RTX 1.7.1): stripped, refittable and
version-compatible engines.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import vlmexport
from vlmexport import errors
from vlmexport.engines import (
    INSTALL_RTX,
    LIBRARIES,
    MODULES,
    PORTABLE_PLACE,
    EngineSpec,
    Flavour,
    Sidecar,
    engine_path,
    graph_digests,
    sm_name,
)
from vlmexport.gpu import RTX_PORTABLE, Gpu
from vlmexport.lower.tensorrt.worker import Built, Request, one_line, peak_rss
from vlmexport.manifest import PartFile, file_sha256
from vlmexport.progress import Progress

# Far more than any build took here (a 1.5B decoder: 4 minutes on a busy machine); it only ends one that hangs.
TIMEOUT = 7200.0
_POLL = 0.05


@dataclass(frozen=True)
class BuildResult:
    """One engine's build: wall and CPU seconds and peak resident bytes of its process, the engine's bytes, layers.

    `version` is the library's. `peak_rss` is 0 where the kernel does not tell.
    """

    version: str
    seconds: float
    cpu_seconds: float
    peak_rss: int
    bytes: int
    layers: int


@dataclass(frozen=True)
class BuiltEngine:
    """One engine of the library: where it lies, its sidecar, and what building it took."""

    path: Path
    sidecar: Sidecar
    result: BuildResult

    @property
    def place(self) -> str:
        """Its folder in the library: ``sm80``, a GPU's name or ``portable``."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """The version of the library that built it."""
        return self.result.version


def rtx_version() -> str | None:
    """The version of TensorRT for RTX that is installed, None without; the library itself is not loaded."""
    if importlib.util.find_spec(MODULES["rtx"]) is None:
        return None
    try:
        return importlib.metadata.version(MODULES["rtx"])
    except importlib.metadata.PackageNotFoundError:
        return None


def require_rtx() -> str:
    """The version of TensorRT for RTX; raises `NotPossibleHereError` with the install line when it is missing."""
    version = rtx_version()
    if version is None:
        raise errors.NotPossibleHereError(f"building engines here needs TensorRT for RTX: {INSTALL_RTX}")
    return version


def build_engines(
    folder: Path,
    specs: Sequence[EngineSpec],
    parts: Mapping[str, PartFile],
    gpu: Gpu | None,
    progress: Progress,
    *,
    flavour: Flavour = "rtx",
    timeout: float = TIMEOUT,
) -> tuple[BuiltEngine, ...]:
    """Build `specs` of the export in `folder` for `gpu` (None: portable, RTX only) into its library of engines.

    RTX engines serve a compute capability and lie in its folder (``engines/sm80``), those of TensorRT itself serve the
    GPU (``engines/a100-80``). Raises what `build_engine` raises, and `NotPossibleHereError` for a GPU that TensorRT for
    RTX builds nothing for.
    """
    place, capabilities, targets = _targets(gpu, flavour)
    digests: dict[str, dict[str, str]] = {}
    built = []
    with progress.stage(f"build engines ({place})", total=len(specs)) as stage:
        for spec in specs:
            graph = folder / parts[spec.part].file
            if spec.part not in digests:
                digests[spec.part] = graph_digests(graph)
            path = engine_path(folder, place, spec.name)
            result = build_engine(graph, spec, targets, path, flavour=flavour, timeout=timeout)
            sidecar = Sidecar(
                flavour=flavour,
                version=result.version,
                compute_capabilities=capabilities,
                gpu=gpu.name if gpu else "",
                spec=spec,
                graph=digests[spec.part],
                engine=file_sha256(path),
                bytes=result.bytes,
            )
            sidecar.write(path)
            built.append(BuiltEngine(path, sidecar, result))
            stage.advance(1, spec.name)
    return tuple(built)


def _targets(gpu: Gpu | None, flavour: Flavour) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The folder's name, the compute capabilities that the engines will serve, and the library's names of them."""
    if flavour == "trt":
        if gpu is None:
            raise errors.BadInputError("TensorRT builds no portable engines here; choose a GPU, or --backend rtx")
        return gpu.name, (gpu.compute_capability,), (gpu.compute_capability,)
    require_rtx()
    if gpu is None:
        # Named, though it is the default: left unset, the library chooses, and does not say what.
        return PORTABLE_PLACE, RTX_PORTABLE, tuple(sm_name(c).upper() for c in RTX_PORTABLE)
    if not gpu.rtx:
        raise errors.NotPossibleHereError(
            f"{gpu.title} has compute capability {gpu.compute_capability}, which TensorRT for RTX does not build for; "
            "run build_engines.sh of the export on that machine"
        )
    return sm_name(gpu.compute_capability), (gpu.compute_capability,), (gpu.rtx,)


def build_engine(
    onnx: Path,
    spec: EngineSpec,
    compute_capabilities: Sequence[str],
    out: Path,
    *,
    flavour: Flavour = "rtx",
    timeout: float = TIMEOUT,
) -> BuildResult:
    """Build the engine `spec` of the graph `onnx` into `out`, in a process of its own, at most `timeout` seconds.

    `compute_capabilities`: TensorRT for RTX's names (``SM80``); several, or none for those of `RTX_PORTABLE`, make one
    engine for all of them. With flavour ``trt`` it is the GPU's compute capability (``8.0``).
    `out` appears when it is whole: an error, a signal or Ctrl-C ends the process and leaves what was there before.

    Raises `UnsupportedModelError` where the library refuses the graph (node and reason), `BadInputError` for INT4 on a
    GPU without it and for profiles that do not fit, `NotPossibleHereError` for a target that it does not build for, a
    missing library, too little memory or disk, a build that does not end and a library that crashes; `VlmExportError`
    when the worker itself fails.
    """
    targets = tuple(compute_capabilities) or tuple(sm_name(c).upper() for c in RTX_PORTABLE)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.NotPossibleHereError(f"cannot write {out.parent}: {error.strerror}") from error
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial").resolve()
    request = Request(flavour, str(onnx.resolve()), str(draft), targets, spec.profiles)
    started = time.perf_counter()
    try:
        built = _run(request, timeout)
        seconds = time.perf_counter() - started
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return BuildResult(built.version, seconds, built.cpu_seconds, built.peak_rss, built.bytes, built.layers)


def _run(request: Request, timeout: float) -> Built:
    """The worker's answer to `request`; every way in which it can fail is one `VlmExportError`."""
    with tempfile.TemporaryFile() as log, _worker(log) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request.to_json().encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended before it read the request: its exit status says why
        peak = _wait(process, request, timeout)
        answer = process.stdout.read()
        if process.returncode != 0 or not answer:
            log.seek(0)
            raise _crash(request, process.returncode, peak, log.read().decode(errors="replace"))
    data: dict[str, Any] = json.loads(answer)
    if "error" in data:
        kind: type[errors.VlmExportError] = getattr(errors, data["error"])
        raise kind(data["message"])
    return Built(**data)


@contextmanager
def _worker(log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker, which does not outlive the block; Ctrl-C in the terminal reaches this process only.

    It finds the same vlmexport as this process, and nothing in the current folder.
    """
    paths = [str(Path(vlmexport.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-m", "vlmexport.lower.tensorrt.worker"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait(process: subprocess.Popen[bytes], request: Request, timeout: float) -> int:
    """Wait for the end of `process`; its peak resident set in bytes as last seen."""
    deadline = time.monotonic() + timeout
    peak = 0
    while time.monotonic() < deadline:
        try:
            process.wait(_POLL)
        except subprocess.TimeoutExpired:
            peak = max(peak, peak_rss(process.pid))
        else:
            return peak
    raise errors.NotPossibleHereError(
        f"{_what(request)}: stopped after {timeout:g} seconds without an end; build it on a faster machine "
        "(build_engines.sh of the export)"
    )


def _crash(request: Request, status: int, peak: int, log: str) -> errors.VlmExportError:
    """What to say of a worker that ended without an answer."""
    said = [line[2:] for line in log.splitlines() if line.startswith("E ")] or log.splitlines()[-1:]
    reason = f"; its last word: {one_line(said[-1])}" if said else ""
    if status == -signal.SIGKILL:
        return errors.NotPossibleHereError(
            f"{_what(request)}: the process was killed at {peak / 1e9:.1f} GB, most often because the machine ran out "
            "of memory; build it on one with more (build_engines.sh of the export)"
        )
    if status < 0:
        died = f"the library died of {signal.Signals(-status).name}"
        return errors.NotPossibleHereError(f"{_what(request)}: {died}{reason}")
    return errors.VlmExportError(f"{_what(request)}: the library ended with exit status {status}{reason}")


def _what(request: Request) -> str:
    return f"{LIBRARIES[request.flavour]} building {Path(request.onnx).name} for {', '.join(request.targets)}"
