"""`Gpu`: what an NVIDIA GPU has and takes, parsed from one TOML file in ``targets/trt`` and checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from vlmexport.errors import BadInputError

GPU_VERSION = 1
# ``--gpu list`` prints the table, so no GPU may have that name.
LIST_WORD = "list"
# The compute capabilities that TensorRT for RTX 1.7 compiles for ahead of time (facts/tensorrt.md, section 2).
RTX_NAMES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
# What an engine for several architectures at once is compiled for: all of them from Ampere on.
RTX_PORTABLE = ("8.0", "8.6", "8.9", "12.0", "12.1")
WEIGHT_KINDS = ("fp16", "int8", "int4")
# TOML key to smallest and largest value that is no slip of the pen, and the factor to the unit of `Gpu`.
_NUMBERS = {
    "memory_gb": ("memory", 1, 1024, 1e9),
    "bandwidth_gb_s": ("bandwidth", 10, 100_000, 1e9),
    "fp16_tflops": ("fp16_flops", 1, 100_000, 1e12),
}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Gpu:
    """One GPU; see ``targets/trt/*.toml``.

    `memory` in bytes, `bandwidth` in bytes per second, `fp16_flops` the dense FP16 tensor-core rate in operations per
    second. `shared_memory`: the CPU uses the same memory. `rtx` is TensorRT for RTX's name of its compute capability
    (``SM80``), or empty where it builds nothing for this GPU. `weights` are the precisions its engines take, `refused`
    the reason for each other one (of ``int4``, ``int8``, ``fp16``). `source` says where the numbers are from, `note`
    which of several boards with a like name is meant (empty where there is one).
    """

    name: str
    title: str
    note: str
    aliases: tuple[str, ...]
    compute_capability: str
    memory: int
    bandwidth: float
    fp16_flops: float
    shared_memory: bool
    rtx: str
    weights: tuple[str, ...]
    refused: dict[str, str]
    source: str

    def check_weights(self, kind: str) -> None:
        """Raise `BadInputError` with the reason when engines for this GPU take no weights of `kind` (``int4``)."""
        if kind not in self.weights:
            raise BadInputError(
                f"{self.name} takes no {kind} weights: {self.refused.get(kind, 'unknown to its profile')}; "
                f"choose --quant {' or '.join(self.weights)}"
            )


def gpu_names() -> list[str]:
    """Names of the profiles that ship with the package, without their aliases."""
    return [gpu.name for gpu in all_gpus()]


@functools.cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every profile that ships, by compute capability and memory; raises `BadInputError` for a wrong or doubled one."""
    files = [f for f in _folder().iterdir() if f.name.endswith(".toml")]
    gpus = []
    for file in files:
        gpu = parse_gpu(tomllib.loads(file.read_text(encoding="utf-8")), file.name)
        if f"{gpu.name}.toml" != file.name:
            raise BadInputError(f"GPU profile {file.name}: its name is {gpu.name!r}; a profile has its file's name")
        gpus.append(gpu)
    gpus_by_name(gpus)
    return tuple(sorted(gpus, key=lambda g: ([int(n) for n in g.compute_capability.split(".")], g.memory, g.name)))


def load_gpu(name: str) -> Gpu:
    """The profile `name`, or the one with that alias; capitals, and spaces or underscores for dashes, do not matter.

    Raises `BadInputError` with the closest names and the whole list when there is none.
    """
    known = gpus_by_name(all_gpus())
    wanted = re.sub(r"[\s_]+", "-", name.strip().casefold())
    if wanted in known:
        return known[wanted]
    close = dict.fromkeys(known[n].name for n in difflib.get_close_matches(wanted, known, n=len(known)))
    closest = f"; closest: {', '.join(list(close)[:3])}" if close else ""
    raise BadInputError(f"GPU {name!r} is unknown{closest}; choose one of {', '.join(gpu_names())}")


def gpus_by_name(gpus: Iterable[Gpu]) -> dict[str, Gpu]:
    """Profiles by name and alias; raises `BadInputError` when two of them claim the same."""
    found: dict[str, Gpu] = {}
    for gpu in gpus:
        for name in (gpu.name, *gpu.aliases):
            if name in found:
                raise BadInputError(f"GPU profiles {found[name].name} and {gpu.name} both claim the name {name!r}")
            found[name] = gpu
    return found


def parse_gpu(data: dict[str, Any], origin: str) -> Gpu:
    """Check a profile's data strictly; `origin` names it in errors.

    Raises `BadInputError` for unknown and missing keys, values of the wrong type or out of range, an RTX name of
    another compute capability, and precisions that are neither taken nor refused with a reason.
    """
    data = dict(data)
    if data.pop("version", None) != GPU_VERSION:
        raise _wrong(origin, f"version must be {GPU_VERSION}")
    _check_keys(data, origin)
    for name in (data["name"], *_strings(data, "aliases", origin)):
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == LIST_WORD:
            raise _wrong(origin, f"{name!r} is no name: lower-case letters, digits and dashes, and not {LIST_WORD!r}")
    for key in ("title", "source", "compute_capability"):
        if not isinstance(data[key], str) or not data[key]:
            raise _wrong(origin, f"{key} must be text")
    if not isinstance(data["note"], str):
        raise _wrong(origin, f"note {data['note']!r} must be text, empty for none")
    if not isinstance(data["shared_memory"], bool):
        raise _wrong(origin, f"shared_memory must be true or false, not {data['shared_memory']!r}")
    _check_compute_capability(data, origin)
    weights = _strings(data, "weights", origin)
    _check_weights(weights, data["refused"], origin)
    numbers = {field: _number(data.pop(key), key, origin) for key, (field, *_) in _NUMBERS.items()}
    numbers["memory"] = round(numbers["memory"])
    return Gpu(**{**data, **numbers, "aliases": tuple(data["aliases"]), "weights": weights})


def _check_keys(data: dict[str, Any], origin: str) -> None:
    fields = {f.name for f in dataclasses.fields(Gpu)} - {field for field, *_ in _NUMBERS.values()}
    known = fields | _NUMBERS.keys()
    missing, unknown = sorted(known - data.keys()), sorted(data.keys() - known)
    if missing or unknown:
        raise _wrong(origin, f"missing keys {missing}, unknown keys {unknown}")


def _check_compute_capability(data: dict[str, Any], origin: str) -> None:
    capability, rtx = data["compute_capability"], data["rtx"]
    if not isinstance(rtx, str):
        raise _wrong(origin, f"rtx {rtx!r} must be text, empty where RTX builds nothing")
    if not re.fullmatch(r"[1-9]\d?\.\d", capability):
        raise _wrong(origin, f"compute_capability {capability!r} is none; write it as '8.0'")
    fitting = f"SM{capability.replace('.', '')}"
    if rtx and rtx not in RTX_NAMES:
        raise _wrong(origin, f"rtx {rtx!r} is none of {', '.join(RTX_NAMES)}; leave it empty where RTX builds nothing")
    if rtx and rtx != fitting:
        raise _wrong(origin, f"rtx {rtx!r} is not compute capability {capability}'s, which is {fitting}")


def _check_weights(weights: tuple[str, ...], refused: Any, origin: str) -> None:
    if not isinstance(refused, dict):
        raise _wrong(origin, "refused must be a table of precision to reason")
    unknown = sorted({*weights, *refused} - set(WEIGHT_KINDS))
    if unknown or not weights:
        raise _wrong(origin, f"weights and refused are of {', '.join(WEIGHT_KINDS)}; found {unknown or 'none'}")
    twice, neither = sorted(set(weights) & refused.keys()), sorted(set(WEIGHT_KINDS) - {*weights, *refused})
    if twice or neither:
        raise _wrong(origin, f"each precision is taken or refused: both {twice}, neither {neither}")
    silent = sorted(kind for kind, reason in refused.items() if not isinstance(reason, str) or not reason)
    if silent:
        raise _wrong(origin, f"{', '.join(silent)} is refused without a reason")


def _strings(data: dict[str, Any], key: str, origin: str) -> tuple[str, ...]:
    """The list of different texts at `key`."""
    found = data[key]
    if not isinstance(found, list) or not all(isinstance(v, str) for v in found) or len(set(found)) != len(found):
        raise _wrong(origin, f"{key} must be a list of different texts, not {found!r}")
    return tuple(found)


def _number(value: Any, key: str, origin: str) -> float:
    _, low, high, factor = _NUMBERS[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _wrong(origin, f"{key} must be a number from {low} to {high}, not {value!r}")
    return value * factor


def _wrong(origin: str, what: str) -> BadInputError:
    return BadInputError(f"GPU profile {origin}: {what}")


def _folder() -> Any:
    try:
        return resources.files("vlmexport.targets") / "trt"
    except ModuleNotFoundError as error:
        raise BadInputError("the GPU profiles are not installed; run `pip install -e .`") from error
