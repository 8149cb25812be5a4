"""The process that builds one engine: ``python -m vlmexport.lower.tensorrt.worker``, started by `build.build_engine`.

TensorRT may abort, take more memory than there is, or hang; here that ends a process of its own. One line of JSON (a
`Request`) comes on standard input, one line of JSON (`Built`, or an error) goes to standard output, and what the
library says to standard error, one ``E`` or ``W`` line each. The process ends when standard input is closed, so that it
does not outlive who started it. It imports nothing but the library.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmexport import errors
from vlmexport.engines import LIBRARIES, MODULES, Dims, Flavour, ShapeProfile

_LONGEST_REASON = 400
# How the library words what went wrong in itself, and not with the graph or the GPU.
_CRASH = re.compile(r"\w+Exception: |CHECK\(.*\) failed|Assertion .* failed|[Ii]nternal [Ee]rror|bad optional access")


@dataclass(frozen=True)
class Request:
    """What to build: `onnx` into `out`, by the library of `flavour`.

    `targets` are names of TensorRT for RTX (``SM80``), several for an engine of several; with TensorRT itself it is the
    compute capability that the GPU here must have (``8.0``).
    """

    flavour: Flavour
    onnx: str
    out: str
    targets: tuple[str, ...]
    profiles: tuple[ShapeProfile, ...]

    def to_json(self) -> str:
        """The request as one line."""
        return json.dumps({**dataclasses.asdict(self), "profiles": [p.to_dict() for p in self.profiles]})

    @staticmethod
    def from_json(line: str) -> Request:
        """Read `to_json`'s line back."""
        data = json.loads(line)
        profiles = tuple(ShapeProfile.from_dict(p) for p in data["profiles"])
        return Request(data["flavour"], data["onnx"], data["out"], tuple(data["targets"]), profiles)


@dataclass(frozen=True)
class Built:
    """What was built: the library's version, the engine's bytes, the layers of the parsed network, and the cost.

    `seconds` are of reading, building and writing, `cpu_seconds` of the whole process, `peak_rss` its largest resident
    set in bytes (0 where the kernel does not tell).
    """

    version: str
    bytes: int
    layers: int
    seconds: float
    cpu_seconds: float
    peak_rss: int


def build(request: Request, trt: Any, log: Callable[[str], None]) -> Built:
    """Build one engine with the module `trt` and write it to ``request.out``.

    Raises `UnsupportedModelError` where the parser or the compiler refuses the graph, `BadInputError` for a profile
    that does not fit it, `NotPossibleHereError` for a compiler that crashes, a target that this library does not build
    for, another GPU than TensorRT is asked to build for, and a file that cannot be written.
    """
    started = time.perf_counter()
    if request.flavour == "trt":
        _require_device(request)
    messages: list[str] = []
    logger = _logger(trt, messages, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # From the file, not from bytes: the parser maps external data instead of holding a second copy.
    if not parser.parse_from_file(request.onnx):
        raise errors.UnsupportedModelError(_parser_errors(request, parser))
    config = builder.create_builder_config()
    if request.flavour == "rtx":
        _set_targets(request, trt, config)
    for profile in request.profiles:
        _add_profile(request, profile, builder, network, config, messages)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _build_error(request, messages)
    _write(Path(request.out), engine)
    seconds = time.perf_counter() - started
    return Built(trt.__version__, engine.nbytes, network.num_layers, seconds, time.process_time(), peak_rss())


def _logger(trt: Any, messages: list[str], log: Callable[[str], None]) -> Any:
    """The library's logger: errors into `messages`, errors and warnings to `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)
                log(f"E {message}")
            elif severity == trt.ILogger.WARNING:
                log(f"W {message}")

    return Logger()


def _parser_errors(request: Request, parser: Any) -> str:
    """One line: the first node that the parser refuses, its reason, and how many more there are."""
    name = f"{LIBRARIES[request.flavour]} cannot read {Path(request.onnx).name}"
    if not parser.num_errors:
        return f"{name} and does not say why"
    first = parser.get_error(0)
    node = f" at {first.node_operator()} node {first.node_name()!r}" if first.node_operator() else ""
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"{name}{node}: {one_line(first.desc())}{more}"


def _set_targets(request: Request, trt: Any, config: Any) -> None:
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    config.num_compute_capabilities = len(request.targets)
    for index, target in enumerate(request.targets):
        # What it refuses it only returns False for, and the build dies later of a "bad optional access".
        if target not in known or not config.set_compute_capability(getattr(trt.ComputeCapability, target), index):
            raise errors.NotPossibleHereError(
                f"TensorRT for RTX {trt.__version__} builds nothing for {target}; it builds for {', '.join(known)}"
            )


def _add_profile(
    request: Request, profile: ShapeProfile, builder: Any, network: Any, config: Any, messages: list[str]
) -> None:
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    where = f"profile {profile.name!r} of {Path(request.onnx).name}"
    if inputs != profile.shapes.keys():
        missing, unknown = sorted(inputs - profile.shapes.keys()), sorted(profile.shapes.keys() - inputs)
        raise errors.BadInputError(f"{where}: no shapes for the inputs {missing}, shapes for no input {unknown}")
    made = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in profile.shapes.items():
        try:
            made.set_shape(name, smallest, usual, largest)
        except ValueError as error:
            raise errors.BadInputError(
                f"{where}: input {name!r} cannot have the shapes {_sizes(smallest)}, {_sizes(usual)} and "
                f"{_sizes(largest)}"
            ) from error
    if config.add_optimization_profile(made) < 0:
        reason = one_line(messages[0]) if messages else "its shapes do not fit the graph's inputs"
        raise errors.BadInputError(f"{where}: {reason}")


def _sizes(dims: Dims) -> str:
    return "x".join(map(str, dims))


def _build_error(request: Request, messages: list[str]) -> errors.VlmExportError:
    """The library's reason, which is the first of its errors: the ones after it follow from it."""
    what = f"{LIBRARIES[request.flavour]} cannot build {Path(request.onnx).name} for {', '.join(request.targets)}"
    if not messages:
        return errors.NotPossibleHereError(f"{what} and does not say why")
    reason = one_line(messages[0])
    if _CRASH.search(reason):
        return errors.NotPossibleHereError(f"{what}, its compiler crashed: {reason}")
    if "HW-specific datatypes: int4" in reason:
        return errors.BadInputError(f"{what}: it has no INT4 weights there; choose --quant int8 or fp16")
    return errors.UnsupportedModelError(f"{what}: {reason}")


def one_line(text: str) -> str:
    """What `text`, a message of the library, says: on one line, without the places in its sources."""
    words = re.sub(r" ?\(?In \w+ at /\S+", "", " ".join(text.split()))
    words = re.sub(r"^\S+: Error Code \d+: ", "", words)
    for frame in (r'.*&& "(.*)"', r"Assertion failed: .*?[^:]: (.*)", r"[A-Z][\w ]* \((?:\[.*?\] )?(.*?)\)?"):
        if match := re.fullmatch(frame, words):
            words = match[1]
    return words.strip()[:_LONGEST_REASON]


def _write(out: Path, engine: Any) -> None:
    try:
        with out.open("wb") as file:
            file.write(memoryview(engine))
    except OSError as error:
        out.unlink(missing_ok=True)
        raise errors.NotPossibleHereError(f"cannot write {out.parent}: {error.strerror}") from error


def _require_device(request: Request) -> None:
    """TensorRT builds for the GPU that is there: refuse when there is none, or another than was asked for."""
    from vlmexport.runtime.tensorrt.cuda import gpu_status

    gpu, wanted = gpu_status(), ", ".join(request.targets)
    if not gpu.compute_capability:
        raise errors.NotPossibleHereError(
            f"TensorRT builds on the GPU that it builds for, and there is none here ({gpu.reason}): run "
            "build_engines.sh on the target, or build with TensorRT for RTX (--backend rtx)"
        )
    if wanted != gpu.compute_capability:
        raise errors.NotPossibleHereError(
            f"TensorRT builds for the GPU that is there, {gpu.name} with compute capability {gpu.compute_capability}, "
            f"not {wanted}: run build_engines.sh on the target"
        )


def peak_rss(pid: int | str = "self") -> int:
    """The largest resident set of a process so far in bytes; 0 where the kernel does not tell, or it has ended.

    It is the kernel's high-water mark of this program (VmHWM): getrusage's begins at the size of the process that
    started it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def main() -> None:
    """Build what standard input asks for; exit code 0 whenever an answer was given."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints is no answer
    request = Request.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, args=(Path(request.out),), daemon=True).start()
    answer: dict[str, Any]
    try:
        trt = _load(request.flavour)
        built = build(request, trt, lambda line: print(line, file=sys.stderr, flush=True))
        answer = dataclasses.asdict(built)
    except errors.VlmExportError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    os._exit(0)  # the library's own end takes time, and may fail without a driver


def _load(flavour: Flavour) -> Any:
    try:
        return importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:
        raise errors.NotPossibleHereError(f"cannot load {LIBRARIES[flavour]}: {one_line(str(error))}") from error


def _end_with_the_parent(out: Path) -> None:
    """Wait for the end of standard input, which means that nobody waits for an answer; leave nothing half written."""
    sys.stdin.read()
    out.unlink(missing_ok=True)
    os._exit(1)


if __name__ == "__main__":
    main()
