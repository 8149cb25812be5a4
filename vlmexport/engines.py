"""TensorRT engines of an export: which there are, for which shapes, and the sidecar by which a loader knows one.

Engines lie in ``engines/<gpu or sm>/NAME.engine`` with ``NAME.engine.json`` beside them. An engine runs only on the
compute capability, with the library and version, and stands only for the graph that its sidecar names; NVIDIA's own
loaders find out late or not at all (TensorRT issues 2176, 574, 2072, 1318).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlmexport.errors import ArtifactError
from vlmexport.manifest import PartFile, file_sha256

TENSORRT_LAYOUT = "tensorrt"  # of the exports that have engines
ENGINES_FOLDER = "engines"
ENGINE_SUFFIX = ".engine"
SIDECAR_FORMAT = "vlmexport-engine"
SIDECAR_VERSION = 1
PORTABLE_PLACE = "portable"
Flavour: TypeAlias = Literal["rtx", "trt"]
# What the two libraries are called, and NVIDIA's Python modules of them, which have the same classes.
LIBRARIES: dict[Flavour, str] = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
MODULES: dict[Flavour, str] = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
INSTALL_RTX = "pip install 'vlmexport[rtx]'"
# Smallest, usual and largest size of a dynamic axis.
AxisRange: TypeAlias = tuple[int, int, int]
Dims: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class TrtLimits:
    """The sizes that engines are built for.

    `max_batch`: sequences at once; `max_seq`: tokens of one sequence, prompt and answer, which is the static cache's
    length; `max_images`: images, or tiles of images, that the vision encoder takes at once; `max_prompt`: new tokens of
    every row in one call (0: as many as the cache takes). A longer prompt goes through in several calls, so a smaller
    number costs little time and saves the workspace that grows with it.
    """

    max_batch: int
    max_seq: int
    max_images: int
    max_prompt: int = 0

    @property
    def prompt(self) -> int:
        """New tokens of every row in one call."""
        return min(self.max_prompt or self.max_seq, self.max_seq)


@dataclass(frozen=True)
class ShapeProfile:
    """One optimization profile: for every input of a graph its smallest, usual and largest shape."""

    name: str
    shapes: dict[str, tuple[Dims, Dims, Dims]]

    @staticmethod
    def of(name: str, part: PartFile, axes: Mapping[str, AxisRange]) -> ShapeProfile:
        """The profile in which every symbolic axis has the range of `axes`; ValueError for one that is not there."""
        missing = sorted({d for t in part.inputs for d in t.dims if isinstance(d, str)} - axes.keys())
        if missing:
            raise ValueError(f"{part.file}: no range for the axes {missing}")
        shapes = {}
        for tensor in part.inputs:
            sizes = [tuple(d if isinstance(d, int) else axes[d][i] for d in tensor.dims) for i in range(3)]
            shapes[tensor.name] = (sizes[0], sizes[1], sizes[2])
        return ShapeProfile(name, shapes)

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON data."""
        return {"name": self.name, "shapes": {n: [list(s) for s in shapes] for n, shapes in self.shapes.items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ShapeProfile:
        """Read `to_dict`'s data back."""
        shapes = {n: (tuple(s[0]), tuple(s[1]), tuple(s[2])) for n, s in data["shapes"].items()}
        return ShapeProfile(data["name"], shapes)


@dataclass(frozen=True)
class EngineSpec:
    """One engine to be built: `name` is the file's (``decoder``), `part` the manifest's part that it is made of."""

    name: str
    part: str
    profiles: tuple[ShapeProfile, ...]

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON data."""
        return {"name": self.name, "part": self.part, "profiles": [p.to_dict() for p in self.profiles]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> EngineSpec:
        """Read `to_dict`'s data back."""
        return EngineSpec(data["name"], data["part"], tuple(ShapeProfile.from_dict(p) for p in data["profiles"]))


# Logits that one call of an engine may ask for in each row; more would need room for [batch, tokens, vocabulary].
MAX_KEPT = 8
_USUAL_PROMPT = 512


def decoder_profiles(part: PartFile, limits: TrtLimits) -> tuple[ShapeProfile, ShapeProfile]:
    """``prefill`` (prompts up to ``limits.prompt`` tokens a call) and ``decode`` (one token of every row)."""
    batch = (1, 1, limits.max_batch)
    prompt = (1, min(_USUAL_PROMPT, limits.prompt), limits.prompt)
    kept = (1, 1, min(MAX_KEPT, limits.prompt))
    one = (1, 1, 1)
    return (
        ShapeProfile.of("prefill", part, {"batch_size": batch, "sequence_length": prompt, "kept_length": kept}),
        ShapeProfile.of("decode", part, {"batch_size": batch, "sequence_length": one, "kept_length": one}),
    )


def engine_specs(
    parts: Mapping[str, PartFile], limits: TrtLimits, vision_axes: Mapping[str, AxisRange], *, split_decoder: bool
) -> tuple[EngineSpec, ...]:
    """The engines of an export: one for each part, or two of the decoder (`split_decoder`), one for each profile.

    `vision_axes` are the ranges of the symbolic axes of the vision encoder and the projector.
    """
    text = (1, min(_USUAL_PROMPT, limits.prompt), limits.prompt)
    ranges: dict[str, Mapping[str, AxisRange]] = {
        "vision_encoder": vision_axes,
        "projector": vision_axes,
        "embed_tokens": {"batch_size": (1, 1, limits.max_batch), "sequence_length": text},
    }
    specs = [
        EngineSpec(role, role, (ShapeProfile.of(role, parts[role], axes),))
        for role, axes in ranges.items()
        if role in parts
    ]
    profiles = decoder_profiles(parts["decoder"], limits)
    if split_decoder:
        return (*specs, *(EngineSpec(f"decoder_{p.name}", "decoder", (p,)) for p in profiles))
    return (*specs, EngineSpec("decoder", "decoder", profiles))


_DAMAGE = (KeyError, TypeError, IndexError, AttributeError, ValueError)


def tensorrt_facts(model: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """``model.tensorrt`` of a manifest, which has the `keys`; `ArtifactError` names the first that it lacks."""
    facts = model.get("tensorrt")
    if not isinstance(facts, dict):
        raise ArtifactError("the manifest has no model.tensorrt: it says nothing of engines; export again")
    if missing := [key for key in keys if key not in facts]:
        raise ArtifactError(f"the manifest's model.tensorrt lacks {missing[0]!r}; export again")
    return facts


def specs_of(model: Mapping[str, Any]) -> tuple[EngineSpec, ...]:
    """The engines that a manifest's ``model.tensorrt`` lists; `ArtifactError` where the list is damaged."""
    listed = tensorrt_facts(model, "engines")["engines"]
    try:
        return tuple(EngineSpec.from_dict(entry) for entry in listed)
    except _DAMAGE as error:
        raise ArtifactError(f"the manifest's model.tensorrt.engines is damaged: {error!r}; export again") from error


_BUILT_KEYS = ("flavour", "version", "places", "reason")


def built_facts(model: Mapping[str, Any]) -> dict[str, Any]:
    """``model.tensorrt.built`` of a manifest: what was built with the export; `ArtifactError` where that is damaged."""
    built = tensorrt_facts(model, "built")["built"]
    if not isinstance(built, dict) or not isinstance(built.get("places", []), list):
        raise ArtifactError(f"the manifest's model.tensorrt.built is {built!r}; export again")
    if missing := [key for key in _BUILT_KEYS if key not in built]:
        raise ArtifactError(f"the manifest's model.tensorrt.built lacks {missing[0]!r}; export again")
    return built


def static_capacity(model: Mapping[str, Any]) -> int | None:
    """Tokens of one sequence, prompt and answer, that a manifest's `model` has room for; None for a cache that grows.

    Raises `ArtifactError` where a static cache's length is not given.
    """
    if model.get("attention") != "static":
        return None
    limits = tensorrt_facts(model, "limits")["limits"]
    try:
        return int(limits["max_seq"])
    except _DAMAGE as error:
        raise ArtifactError(f"the manifest's model.tensorrt.limits is {limits!r}, without max_seq") from error


@dataclass(frozen=True)
class Sidecar:
    """What ``NAME.engine.json`` says of an engine.

    `flavour` and `version` are the library that built it and loads it (``rtx`` 1.7.1.116, ``trt`` 11.4.0.106);
    `compute_capabilities` what it runs on (``("8.0",)``; several for a portable one); `gpu` the profile it was asked
    for, or empty for a portable one; `graph` the SHA-256 of the ONNX file and of its external data, by file name;
    `engine` the SHA-256 of the engine itself.
    """

    flavour: Flavour
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str
    spec: EngineSpec
    graph: dict[str, str]
    engine: str
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The sidecar as JSON data, with its format and version."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {"compute_capabilities": list(self.compute_capabilities), "spec": self.spec.to_dict()}
        return {"format": SIDECAR_FORMAT, "sidecar_version": SIDECAR_VERSION, **fields, **changed}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Sidecar:
        """Read `to_dict`'s data back.

        Raises `ArtifactError` for another format, a newer version, missing or unknown keys and values of a wrong type.
        """
        if data.get("format") != SIDECAR_FORMAT:
            raise ArtifactError(f"format {data.get('format')!r}, expected {SIDECAR_FORMAT!r}")
        if data.get("sidecar_version") != SIDECAR_VERSION:
            raise ArtifactError(
                f"sidecar_version {data.get('sidecar_version')!r}; this vlmexport reads {SIDECAR_VERSION}: upgrade it"
            )
        known = {f.name for f in dataclasses.fields(Sidecar)} | {"format", "sidecar_version"}
        if data.keys() != known:
            missing, unknown = sorted(known - data.keys()), sorted(data.keys() - known)
            raise ArtifactError(f"missing keys {missing}, unknown keys {unknown}")
        wrong = [key for key, is_right in _SIDECAR_TYPES.items() if not is_right(data[key])]
        if wrong:
            raise ArtifactError(f"{wrong[0]} is {data[wrong[0]]!r}")
        try:
            spec = EngineSpec.from_dict(data["spec"])
        except _DAMAGE as error:
            raise ArtifactError(f"spec is damaged: {error}") from error
        return Sidecar(
            data["flavour"],
            data["version"],
            tuple(data["compute_capabilities"]),
            data["gpu"],
            spec,
            dict(data["graph"]),
            data["engine"],
            data["bytes"],
        )

    def write(self, engine: Path) -> Path:
        """Write the sidecar beside `engine`, at once: a reader sees the old one or the new one."""
        path = sidecar_path(engine)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    @staticmethod
    def read(engine: Path) -> Sidecar:
        """The sidecar beside `engine`; raises `ArtifactError` when it is missing or damaged."""
        path = sidecar_path(engine)
        if not path.is_file():
            raise ArtifactError(f"{engine} has no sidecar {path.name}: nothing says what it was built for; {_REBUILD}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ArtifactError(f"{path} is not a JSON object")
        try:
            return Sidecar.from_dict(data)
        except ArtifactError as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error


_REBUILD = "build the engine again (build_engines.sh in the export's folder)"
_SHA256 = re.compile("[0-9a-f]{64}")
_COMPUTE_CAPABILITY = re.compile(r"(\d+)\.(\d)")
_SM_NAME = re.compile(r"sm\d{2,}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _are_compute_capabilities(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(v, str) and _COMPUTE_CAPABILITY.fullmatch(v) for v in value)


_SIDECAR_TYPES: dict[str, Callable[[Any], bool]] = {
    "flavour": lambda value: isinstance(value, str) and value in LIBRARIES,
    "version": lambda value: isinstance(value, str) and value != "",
    "compute_capabilities": _are_compute_capabilities,
    "gpu": lambda value: isinstance(value, str),
    "spec": lambda value: isinstance(value, dict),
    "graph": lambda value: isinstance(value, dict) and value != {} and all(map(_is_digest, value.values())),
    "engine": _is_digest,
    "bytes": lambda value: type(value) is int and value > 0,
}


def sm_name(compute_capability: str) -> str:
    """``sm80`` for ``8.0``; ValueError for what is no compute capability."""
    match = _COMPUTE_CAPABILITY.fullmatch(compute_capability)
    if match is None:
        raise ValueError(f"{compute_capability!r} is no compute capability such as 8.0")
    return f"sm{match[1]}{match[2]}"


def engine_path(root: Path, place: str, name: str) -> Path:
    """``engines/<place>/<name>.engine`` of the export in `root`.

    Raises `ArtifactError` for a place or name that is not a plain file name: both may be read from an export.
    """
    for word in (place, name):
        if not _NAME.fullmatch(word):
            raise ArtifactError(f"{word!r} cannot name an engine or its folder: letters, digits, '_', '-' and '.' only")
    return root / ENGINES_FOLDER / place / f"{name}{ENGINE_SUFFIX}"


def sidecar_path(engine: Path) -> Path:
    """``NAME.engine.json`` beside ``NAME.engine``."""
    return engine.with_name(f"{engine.name}.json")


def engine_files(root: Path, place: str = "*") -> list[Path]:
    """The engines of the export in `root`, of all places or of one, whoever built them; by path."""
    return sorted((root / ENGINES_FOLDER).glob(f"{place}/*{ENGINE_SUFFIX}"))


def graph_digests(onnx_path: Path) -> dict[str, str]:
    """SHA-256 of every one of `graph_files`, by path relative to the graph's folder; raises as that does."""
    return {name: file_sha256(onnx_path.parent / name) for name in graph_files(onnx_path)}


def graph_files(onnx_path: Path) -> tuple[str, ...]:
    """An ONNX file and every file of external data that it names, relative to its folder; the graph comes first.

    Raises `ArtifactError` when the graph cannot be read, or names data that is missing or outside its folder.
    """
    import onnx
    from google.protobuf.message import DecodeError

    folder = onnx_path.parent.resolve()
    try:
        model = onnx.load(onnx_path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"{onnx_path} cannot be read as ONNX: {error}") from error
    names = [onnx_path.name]
    for location in sorted(set(_external_locations(model))):
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise ArtifactError(f"{onnx_path} names the data {location!r}, which is outside its folder")
        if not file.is_file():
            raise ArtifactError(f"{onnx_path} names the data {location!r}, which is missing")
        names.append(file.relative_to(folder).as_posix())
    return tuple(names)


def _external_locations(message: Any) -> Iterator[str]:
    """The files of external data of all tensors below a protobuf message: initializers, attributes, subgraphs."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Iterable) else (value,):
                yield from _external_locations(inner)


def check_sidecar(
    engine_path: Path, *, flavour: Flavour, version: str, compute_capability: str, graph: Path | None, gpu: str = ""
) -> Sidecar:
    """The sidecar of an engine that may be loaded here; to be called before any byte of it is given to the library.

    `flavour` and `version` are the library that would load it; `compute_capability` is the GPU's and `gpu` its name,
    for the message; `graph` the ONNX file that the engine must stand for (None: not compared).
    Raises `ArtifactError`, one line, for a missing or damaged sidecar, another library or version, another compute
    capability, an engine whose bytes were changed, and a graph that was changed since.
    """
    if not engine_path.is_file():
        raise ArtifactError(f"there is no engine {engine_path}; {_REBUILD}")
    sidecar = Sidecar.read(engine_path)
    if sidecar.flavour != flavour or sidecar.version != version:
        raise ArtifactError(
            f"{engine_path} was built by {LIBRARIES[sidecar.flavour]} {sidecar.version}, here is {LIBRARIES[flavour]} "
            f"{version}: install that version, or {_REBUILD}"
        )
    if compute_capability not in sidecar.compute_capabilities:
        built_for = " and ".join(sidecar.compute_capabilities) + (f" ({sidecar.gpu})" if sidecar.gpu else "")
        here = compute_capability + (f" ({gpu})" if gpu else "")
        raise ArtifactError(f"{engine_path} was built for {built_for}, this GPU is {here}: {_REBUILD}")
    if engine_path.stat().st_size != sidecar.bytes or file_sha256(engine_path) != sidecar.engine:
        raise ArtifactError(f"{engine_path} was changed after it was built (its SHA-256 differs from the sidecar's)")
    if graph is not None:
        _check_graph(engine_path, sidecar, graph)
    return sidecar


def _check_graph(engine: Path, sidecar: Sidecar, graph: Path) -> None:
    now = graph_digests(graph)
    changed = sorted(name for name in now.keys() | sidecar.graph.keys() if now.get(name) != sidecar.graph.get(name))
    if changed:
        raise ArtifactError(f"{engine} was built from another {graph.name} ({', '.join(changed)} differ): {_REBUILD}")


def sidecar_faults(engine: Path, said: Sidecar, spec: EngineSpec, *, listed: bool) -> list[str]:
    """How the sidecar of ``<place>/NAME.engine`` differs from the manifest's `spec` of it and from its place's name.

    `listed`: the manifest says that the place was built with the export; the shapes are then compared, too. Without it
    the engine was built later and is only bound to part and profiles.
    """
    faults = []
    if (said.spec.name, said.spec.part) != (spec.name, spec.part):
        faults.append(f"{engine.name} is the engine {said.spec.name} of {said.spec.part}, as its sidecar says")
    profiles, wanted = ([p.name for p in each.profiles] for each in (said.spec, spec))
    if profiles != wanted:
        faults.append(f"{engine.name} has the profiles {profiles}; the manifest has {wanted}")
    elif listed:
        faults += _shape_faults(engine, said.spec, spec)
    return faults + _place_faults(engine, said)


def _shape_faults(engine: Path, said: EngineSpec, wanted: EngineSpec) -> list[str]:
    faults = []
    for mine, theirs in zip(said.profiles, wanted.profiles, strict=True):
        for name in sorted(mine.shapes.keys() | theirs.shapes.keys()):
            shapes = mine.shapes.get(name), theirs.shapes.get(name)
            if shapes[0] != shapes[1]:
                texts = [" ".join(str(list(s)) for s in each) if each else "nothing" for each in shapes]
                faults.append(f"{engine.name} takes {name} {texts[0]} in {mine.name}; the manifest has {texts[1]}")
    return faults


def _place_faults(engine: Path, said: Sidecar) -> list[str]:
    """A folder is named for a compute capability, for several (`PORTABLE_PLACE`), or for a GPU."""
    place, built_for = engine.parent.name, list(said.compute_capabilities)
    if place == PORTABLE_PLACE:
        good = len(built_for) > 1
    elif _SM_NAME.fullmatch(place):
        good = [sm_name(capability) for capability in built_for] == [place]
    else:
        good = said.gpu == place
    named = f" ({said.gpu})" if said.gpu else ""
    return [] if good else [f"{engine.name} lies in {place} and was built for {' and '.join(built_for)}{named}"]
