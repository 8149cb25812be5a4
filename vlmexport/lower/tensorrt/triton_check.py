"""Does a Triton repository agree with the graphs? Names, types and dims of every ``config.pbtxt``, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vlmexport.engines import graph_files
from vlmexport.errors import ArtifactError
from vlmexport.lower.tensorrt.triton_config import described, read_config, tensor
from vlmexport.lower.tensorrt.triton_config import model_config as message
from vlmexport.manifest import PartFile, TensorSpec, file_sha256

CACHE_PREFIXES = ("past_key_values.", "present.")
Described: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
_OWN_INPUTS: Described = {"input_ids": ("TYPE_INT64", (-1,)), "max_tokens": ("TYPE_INT64", (1,))}
_OWN_OUTPUTS: Described = {"token_ids": ("TYPE_INT64", (-1,))}


def check_triton(root: Path, parts: Mapping[str, PartFile]) -> list[str]:
    """What is wrong with the repository in `root`, one line each; empty when all of it agrees with `parts`."""
    faults: list[str] = []
    configs = _configs(root, [*parts, "image_features", "vlm"], faults)
    for role, part in parts.items():
        if role in configs:
            faults += _part_faults(root, role, configs[role], part)
    if "image_features" in configs:
        faults += _ensemble_faults(configs, parts)
    if "vlm" in configs:
        pixels = _expected(parts["vision_encoder"].inputs)
        faults += _differences("vlm", "input", configs["vlm"].input, {**_OWN_INPUTS, **pixels})
        faults += _differences("vlm", "output", configs["vlm"].output, _OWN_OUTPUTS)
        faults += _code_faults(root, "vlm")
    return faults + _rtx_faults(root)


def _configs(root: Path, names: Sequence[str], faults: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        path = root / name / "config.pbtxt"
        if not path.is_file():
            faults.append(f"{name}: there is no config.pbtxt")
            continue
        try:
            found[name] = read_config(path.read_text(encoding="utf-8"), f"{name}/config.pbtxt")
        except ArtifactError as error:
            faults.append(str(error))
            continue
        if found[name].name != name:
            faults.append(f"{name}: config.pbtxt says the name {found[name].name!r}")
        if found[name].max_batch_size:
            faults.append(f"{name}: max_batch_size is {found[name].max_batch_size}; the batch is one of the dims, so 0")
    return found


def _part_faults(root: Path, role: str, config: Any, part: PartFile) -> list[str]:
    faults: list[str] = []
    inputs, outputs = _expected(part.inputs), _expected(part.outputs)
    if config.backend == "python":
        if not config.HasField("sequence_batching"):
            faults.append(
                f"{role}: it keeps the cache, and nothing routes a sequence to it: sequence_batching is missing"
            )
        inputs, outputs = (_without_cache(side) for side in (inputs, outputs))
        faults += _code_faults(root, role)
    elif config.backend == "onnxruntime":
        faults += _graph_faults(root, role, config, part)
    elif config.platform != "tensorrt_plan":
        faults.append(f"{role}: backend {config.backend!r}, platform {config.platform!r} runs no part of an export")
    elif any(name.startswith(CACHE_PREFIXES) for name in inputs):
        faults.append(f"{role}: Triton's TensorRT backend cannot update a cache in place")
    faults += _differences(role, "input", config.input, inputs)
    return faults + _differences(role, "output", config.output, outputs)


def _graph_faults(root: Path, role: str, config: Any, part: PartFile) -> list[str]:
    graph = root / role / "1" / config.default_model_filename
    if graph.name != Path(part.file).name:
        return [f"{role}: it names the graph {config.default_model_filename!r}, the export's is {part.file!r}"]
    try:
        graph_files(graph)
    except ArtifactError as error:
        return [f"{role}: {error}"]
    return []


def _code_faults(root: Path, name: str) -> list[str]:
    return [] if (root / name / "1" / "model.py").is_file() else [f"{name}: there is no 1/model.py"]


def _ensemble_faults(configs: Mapping[str, Any], parts: Mapping[str, PartFile]) -> list[str]:
    """The ensemble's own tensors, and each step's: all of a model's inputs fed, by something of the same type."""
    name, config = "image_features", configs["image_features"]
    faults = _differences(name, "input", config.input, _expected(parts["vision_encoder"].inputs))
    faults += _differences(name, "output", config.output, _expected(parts["projector"].outputs))
    known = described(config.input)
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            faults.append(f"{name}: a step runs {step.model_name!r}, which is not in the repository")
            continue
        model = configs[step.model_name]
        faults += _step_faults(f"{name}: {step.model_name}", step, model, known)
        made = described(model.output)
        known.update({inner: made[key] for key, inner in step.output_map.items() if key in made})
    lacking = [t.name for t in config.output if t.name not in known]
    return faults + [f"{name}: no step makes the output {tensor_name}" for tensor_name in lacking]


def _step_faults(where: str, step: Any, model: Any, known: Described) -> list[str]:
    needed, made = described(model.input), described(model.output)
    faults = [f"{where}: its input {key} is not fed" for key in needed if key not in step.input_map]
    faults += [f"{where}: it has no output {key}" for key in step.output_map if key not in made]
    for key, inner in step.input_map.items():
        if key not in needed:
            faults.append(f"{where}: it has no input {key}")
        elif inner not in known:
            faults.append(f"{where}: nothing makes {inner}")
        elif not _fits(known[inner], needed[key]):
            faults.append(f"{where}: {key} is {needed[key]}, {inner} is {known[inner]}")
    return faults


def _fits(given: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    sizes = zip(given[1], wanted[1], strict=False)
    return given[0] == wanted[0] and len(given[1]) == len(wanted[1]) and all(a == b or -1 in (a, b) for a, b in sizes)


def _expected(specs: Sequence[TensorSpec]) -> Described:
    return described(message(input=[tensor(spec) for spec in specs]).input)


def _without_cache(side: Described) -> Described:
    return {name: what for name, what in side.items() if not name.startswith(CACHE_PREFIXES)}


def _differences(model: str, kind: str, tensors: Any, expected: Described) -> list[str]:
    found = described(tensors)
    faults = [f"{model}: the {kind} {name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{model}: the graph has no {kind} {name}" for name in found.keys() - expected.keys()]
    for name in found.keys() & expected.keys():
        if found[name] != expected[name]:
            faults.append(f"{model}: the {kind} {name} is {_said(found[name])}, the graph's {_said(expected[name])}")
    if len(tensors) != len(found):
        faults.append(f"{model}: an {kind} is listed twice")
    return sorted(faults)


def _said(what: tuple[str, tuple[int, ...]]) -> str:
    return f"{what[0]} {list(what[1])}"


def _rtx_faults(root: Path) -> list[str]:
    """Engines of TensorRT for RTX that were put where Triton would load them, found by their bytes' sidecars."""
    rtx = {}
    for sidecar in (root.parent / "engines").glob("*/*.engine.json"):
        data = json.loads(sidecar.read_text(encoding="utf-8"))
        if data.get("flavour") == "rtx":
            rtx[data["engine"]] = sidecar
    plans = root.glob("*/1/*.plan") if rtx else ()
    return [
        f"{plan.relative_to(root)} is {rtx[digest].name} of TensorRT for RTX, which Triton does not load"
        for plan in plans
        if (digest := file_sha256(plan)) in rtx
    ]
