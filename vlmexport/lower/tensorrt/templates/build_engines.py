#!/usr/bin/env python3
"""Build the TensorRT engines of this export on the machine that will run them.

Stand-alone: the standard library and ``tensorrt`` (or ``tensorrt_rtx`` with ``--flavour rtx``). What to build is read
from ``engines.json`` beside this file. TensorRT engines go to ``engines/<gpu>``, those of TensorRT for RTX to
``engines/<sm>``, each with the sidecar ``NAME.engine.json`` by which a loader knows it. Nothing here runs an engine.

  python3 build_engines.py                         all engines, with TensorRT, for the GPU in this machine
  python3 build_engines.py --only decoder          one of them
  python3 build_engines.py --flavour rtx           with TensorRT for RTX, which needs no GPU
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JOB_FILE = "engines.json"
JOB_FORMAT = "vlmexport-build"
JOB_VERSION = 1
PLACES_FILE = "triton/engines.json"
MANIFEST_FILE = "manifest.json"
MODULES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
# From this version on the precision of every operation is the graph's; older ones may choose another.
FIRST_STRONGLY_TYPED = 11
INSTALL = {
    "trt": "install it as NVIDIA's installation guide for TensorRT says (PyPI's package is a stub that fetches the "
    "real one from NVIDIA's index, pypi.nvidia.com)",
    "rtx": "install it with: pip install tensorrt-rtx",
}
SIDECAR = {"format": "vlmexport-engine", "sidecar_version": 1}


class BuildError(Exception):
    """Why there is no engine: one line."""


def read_job(root: Path) -> dict[str, Any]:
    """The build job of the export in `root`; raises `BuildError` when it is missing or of another version."""
    path = root / JOB_FILE
    try:
        job: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} cannot be read: {error}") from error
    if job.get("format") != JOB_FORMAT or job.get("version") != JOB_VERSION:
        raise BuildError(f"{path} is not of format {JOB_FORMAT} version {JOB_VERSION}: use the script of its export")
    return job


def chosen(job: dict[str, Any], only: list[str]) -> list[dict[str, Any]]:
    """The engines named by `only`, or all; raises `BuildError` for an unknown name."""
    names = [entry["spec"]["name"] for entry in job["engines"]]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise BuildError(f"there is no engine {unknown[0]!r}; this export has {', '.join(names)}")
    return [entry for entry in job["engines"] if not only or entry["spec"]["name"] in only]


def place(job: dict[str, Any], flavour: str, capabilities: list[str]) -> str:
    """The folder below ``engines``: the GPU's name, or for RTX the compute capability (``sm80``)."""
    if flavour == "trt":
        return str(job["gpu"]["name"])
    return capabilities[0].lower() if len(capabilities) == 1 else "portable"


def engine_file(root: Path, folder: str, entry: dict[str, Any]) -> Path:
    """Where an engine lies."""
    return root / "engines" / folder / f"{entry['spec']['name']}.engine"


def sha256(path: Path) -> str:
    """SHA-256 of a file as a hex string, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def dotted(capability: str) -> str:
    """``8.0`` for ``SM80``, ``12.0`` for ``SM120``."""
    digits = capability.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def usual_device() -> str:
    """The first GPU that this process may see, as nvidia-smi and CUDA_VISIBLE_DEVICES call it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def choose_gpu(device: str) -> None:
    """Let the library, once it is loaded, see no other GPU than the one that nvidia-smi calls `device`."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = device


def gpu_capability(device: str) -> str:
    """The compute capability of GPU `device`, from nvidia-smi; raises `BuildError` when it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", f"--id={device}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"nvidia-smi does not say which GPU {device} is ({error}); --skip-gpu-check trusts you"
        ) from error
    return done.stdout.strip()


def check_gpu(job: dict[str, Any], device: str) -> None:
    """Raise `BuildError` unless GPU `device` has the compute capability that the export was made for."""
    wanted, here = job["gpu"]["compute_capability"], gpu_capability(device)
    if here != wanted:
        raise BuildError(
            f"GPU {device} has compute capability {here}, this export was made for {job['gpu']['title']} ({wanted}): "
            "export it again with --gpu for this one"
        )


def check_version(job: dict[str, Any], flavour: str, version: str) -> None:
    """Raise `BuildError` for a TensorRT that is too old; warn where it is not the one that this was written for."""
    if flavour == "trt" and int(version.split(".")[0]) < FIRST_STRONGLY_TYPED:
        raise BuildError(
            f"TensorRT {version} is older than {FIRST_STRONGLY_TYPED}.0, from which on a graph's types hold"
        )
    expected = job["versions"][flavour]
    print(f"{MODULES[flavour]} {version}, written for {expected}")
    if version != expected:
        print(
            f"warning: {MODULES[flavour]} {version} is not {expected}: engines load only with {version}",
            file=sys.stderr,
        )


def write_sidecar(
    root: Path,
    job: dict[str, Any],
    entry: dict[str, Any],
    engine: Path,
    *,
    flavour: str,
    version: str,
    runs_on: list[str],
) -> Path:
    """Write ``NAME.engine.json``; `runs_on` are compute capabilities."""
    if not engine.is_file():
        raise BuildError(f"there is no engine {engine}: build it first")
    sidecar = {
        **SIDECAR,
        "flavour": flavour,
        "version": version,
        "compute_capabilities": runs_on,
        "gpu": job["gpu"]["name"] if runs_on == [job["gpu"]["compute_capability"]] else "",
        "spec": entry["spec"],
        "graph": {name: sha256((root / entry["graph"]).parent / name) for name in entry["files"]},
        "engine": sha256(engine),
        "bytes": engine.stat().st_size,
    }
    path = engine.with_name(f"{engine.name}.json")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def shapes_argument(entry: dict[str, Any], profile: dict[str, Any], which: int) -> str:
    """A profile's shapes in the form of trtexec: ``name:1x2x3,...``, inputs of fixed shape left out."""
    parts = []
    for name in entry["dynamic"]:
        if any(character in name for character in ",':"):
            raise BuildError(f"trtexec cannot be given the input name {name!r}; use build_engines.py")
        parts.append(f"{name}:{'x'.join(map(str, profile['shapes'][name][which]))}")
    return ",".join(parts)


def trtexec_arguments(root: Path, entry: dict[str, Any], engine: Path) -> list[str]:
    """Arguments of trtexec for one engine; precision is the graph's, so there is none to ask for.

    The GPU is the first of those that build_engines.sh lets it see, which is one.
    """
    cache = engine.with_name("timing.cache")
    arguments = [f"--onnx={root / entry['graph']}", f"--saveEngine={engine}", f"--timingCacheFile={cache}"]
    arguments += ["--skipInference", "--device=0"]
    if not entry["dynamic"]:
        return arguments
    for index, profile in enumerate(entry["spec"]["profiles"]):
        arguments.append(f"--profile={index}")
        for which, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            arguments.append(f"{option}={shapes_argument(entry, profile, which)}")
    return arguments


def load_library(flavour: str) -> Any:
    """The Python package of TensorRT or TensorRT for RTX; raises `BuildError` with what to install."""
    try:
        return importlib.import_module(MODULES[flavour])
    except ImportError as error:
        raise BuildError(f"{MODULES[flavour]} does not import ({error}); {INSTALL[flavour]}") from error


def build(trt: Any, root: Path, entry: dict[str, Any], cache: Path | None, capabilities: list[str]) -> Any:
    """Parse the graph, add the profiles and build; the serialized engine, a buffer of bytes."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    graph = root / entry["graph"]
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{graph.name} was refused: {'; '.join(errors)}")
    config = builder.create_builder_config()
    if capabilities:
        _aim(trt, config, capabilities)
    for profile in entry["spec"]["profiles"] if entry["dynamic"] else ():
        config.add_optimization_profile(_profile(builder, entry, profile))
    if cache is not None:
        held = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(held, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{entry['spec']['name']} was not built; the library's messages above say why")
    if cache is not None:
        cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return engine


def _aim(trt: Any, config: Any, capabilities: list[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        known = getattr(trt.ComputeCapability, name, None)
        if known is None or not config.set_compute_capability(known, index):
            names = ", ".join(n for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
            raise BuildError(f"TensorRT for RTX does not build for {name}, but for {names}")


def _profile(builder: Any, entry: dict[str, Any], profile: dict[str, Any]) -> Any:
    made = builder.create_optimization_profile()
    for name in entry["dynamic"]:
        made.set_shape(name, *(tuple(shape) for shape in profile["shapes"][name]))
    return made


def put_into_triton(root: Path, entry: dict[str, Any], engine: Path) -> list[Path]:
    """Link (or copy) an engine to where the Triton repository expects it; nothing where there is none."""
    listing = root / PLACES_FILE
    if not listing.is_file():
        return []
    places: list[str] = json.loads(listing.read_text(encoding="utf-8")).get(entry["spec"]["name"], [])
    targets = [listing.parent / name for name in places]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(engine, target)
        except OSError:
            shutil.copyfile(engine, target)
    return targets


def record(root: Path, built: list[Path]) -> None:
    """Give the manifest the new digests of files that it lists: an engine that came with the export was replaced."""
    path = root / MANIFEST_FILE
    if not path.is_file():
        return
    manifest = json.loads(path.read_text(encoding="utf-8"))
    listed = {file.relative_to(root).as_posix(): file for file in built}
    changed = {name: file for name, file in listed.items() if name in manifest["files"]}
    for name, file in changed.items():
        manifest["files"][name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    if changed:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(path)


def finish(
    root: Path,
    job: dict[str, Any],
    entry: dict[str, Any],
    engine: Path,
    *,
    flavour: str,
    version: str,
    runs_on: list[str],
) -> None:
    """The sidecar and, for TensorRT's own engines, the Triton repository: its backend loads no others."""
    sidecar = write_sidecar(root, job, entry, engine, flavour=flavour, version=version, runs_on=runs_on)
    record(root, [engine, sidecar])
    for target in put_into_triton(root, entry, engine) if flavour == "trt" else ():
        print(f"{entry['spec']['name']}: {target.relative_to(root)}")


def build_all(args: argparse.Namespace, job: dict[str, Any]) -> None:
    """Build every chosen engine through the Python API and write its sidecar."""
    if args.flavour == "trt":
        choose_gpu(args.device)
    trt = load_library(args.flavour)
    check_version(job, args.flavour, trt.__version__)
    if args.flavour == "trt" and not args.skip_gpu_check:
        check_gpu(job, args.device)
    capabilities = rtx_capabilities(args, job)
    runs_on = [dotted(name) for name in capabilities] or [job["gpu"]["compute_capability"]]
    for entry in chosen(job, args.only):
        engine = engine_file(HERE, place(job, args.flavour, capabilities), entry)
        started = time.monotonic()
        built = build(trt, HERE, entry, args.timing_cache, capabilities)
        engine.parent.mkdir(parents=True, exist_ok=True)
        draft = engine.with_name(f".{engine.name}.{os.getpid()}")
        draft.write_bytes(built)
        draft.replace(engine)
        finish(HERE, job, entry, engine, flavour=args.flavour, version=trt.__version__, runs_on=runs_on)
        took = time.monotonic() - started
        print(f"{entry['spec']['name']}: built, {engine.stat().st_size} bytes, {took:.1f} s; not run")


def rtx_capabilities(args: argparse.Namespace, job: dict[str, Any]) -> list[str]:
    """What TensorRT for RTX builds for: ``--compute-capability``, or the GPU of the export; empty for TensorRT."""
    if args.flavour == "trt":
        if args.compute_capability:
            raise BuildError("--compute-capability is for --flavour rtx; TensorRT builds for the GPU that it runs on")
        return []
    names = args.compute_capability or [job["gpu"]["rtx"]]
    if not names[0]:
        raise BuildError(f"TensorRT for RTX builds nothing for {job['gpu']['title']}; use --flavour trt on that GPU")
    return list(names)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; `action` is what to do instead of building."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavour", choices=tuple(MODULES), default="trt", help="the library (default: trt)")
    parser.add_argument(
        "--only", metavar="NAME", action="append", default=[], help="build this engine; may be repeated"
    )
    parser.add_argument("--timing-cache", metavar="FILE", type=Path, help="read and write the builder's timings here")
    parser.add_argument(
        "--compute-capability", metavar="SM", action="append", default=[], help="for rtx, such as SM80; may be repeated"
    )
    parser.add_argument(
        "--device", default=usual_device(), help="the GPU's number in nvidia-smi (default: the first visible one)"
    )
    parser.add_argument("--skip-gpu-check", action="store_true", help="do not compare the GPU with the export's")
    steps = parser.add_argument_group("steps of build_engines.sh").add_mutually_exclusive_group()
    steps.add_argument("--names", action="store_true", help="print the engines' names, each ended by a zero byte")
    steps.add_argument("--check", action="store_true", help="check the GPU and --library-version")
    steps.add_argument("--trtexec-arguments", metavar="NAME", help="print trtexec's, each ended by a zero byte")
    steps.add_argument("--sidecar-only", metavar="NAME", help="write the sidecar of an engine that trtexec built")
    parser.add_argument(
        "--library-version", metavar="VERSION", help="the TensorRT that trtexec is of, such as 11.4.0.106"
    )
    args = parser.parse_args(arguments)
    if (args.check or args.sidecar_only) and not args.library_version:
        parser.error("--check and --sidecar-only need --library-version")
    if args.timing_cache and args.flavour == "rtx":
        parser.error("TensorRT for RTX keeps no timings: --timing-cache is for --flavour trt")
    return args


def step(args: argparse.Namespace, job: dict[str, Any]) -> None:
    """One step of build_engines.sh."""
    if args.check:
        check_version(job, "trt", args.library_version)
        if not args.skip_gpu_check:
            check_gpu(job, args.device)
        return
    if args.names:
        _print_words([entry["spec"]["name"] for entry in chosen(job, args.only)])
        return
    (entry,) = chosen(job, [args.trtexec_arguments or args.sidecar_only])
    engine = engine_file(HERE, place(job, "trt", []), entry)
    if args.trtexec_arguments:
        engine.parent.mkdir(parents=True, exist_ok=True)
        _print_words(trtexec_arguments(HERE, entry, engine))
        return
    runs_on = [job["gpu"]["compute_capability"]]
    finish(HERE, job, entry, engine, flavour="trt", version=args.library_version, runs_on=runs_on)


def _print_words(words: list[str]) -> None:
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))


def main(arguments: list[str]) -> int:
    """Exit status 0, or 1 with one line on standard error."""
    args = parse_arguments(arguments)
    try:
        job = read_job(HERE)
        if args.check or args.names or args.trtexec_arguments or args.sidecar_only:
            step(args, job)
        else:
            build_all(args, job)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
