"""The manifest of an export: what is in the folder, how it was made, and what was proven about it.

`lower` writes it, `runtime` runs from it, `verify` and `bench` judge from it: the three meet here and nowhere else.
The file is ``manifest.json``; unknown versions are refused, every file in the folder is listed with its SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmexport.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
# The floats that calibration changed (norms and biases into which scales were folded), for the gate's reference.
FOLDED_NAME = "folded.safetensors"
# The factors by which weights of a GGUF export were changed, and the importances that its types were chosen by.
FOLDS_NAME = "folds.safetensors"
IMATRIX_NAME = "imatrix.gguf"
# The prompt graph of ``--prefill int8``: a part like the others, with matrices of its own.
PREFILL_PART = "decoder_prefill"
# The image processor's graph of ``--with-preprocessor``: a part without weights, which no runner needs.
PREPROCESSOR_PART = "preprocessor"
MANIFEST_FORMAT = "vlmexport"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output.

    `dtype` is a numpy dtype name (``float32``, ``float16``, ``int64``, ``bool``); `dims` mixes static sizes (int) and
    symbolic names (str), for example ``("batch_size", 2, "past_sequence_length", 64)``.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TensorSpec:
        """Read one entry of the manifest."""
        return TensorSpec(data["name"], data["dtype"], tuple(data["dims"]))


@dataclass(frozen=True)
class PartFile:
    """One graph of the export: its file (relative to the folder) and its typed inputs and outputs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PartFile:
        """Read one entry of the manifest."""
        return PartFile(
            data["file"],
            tuple(TensorSpec.from_dict(t) for t in data["inputs"]),
            tuple(TensorSpec.from_dict(t) for t in data["outputs"]),
        )


@dataclass(frozen=True)
class FileRecord:
    """Digest and size in bytes of one file of the export."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class QuantizedMember:
    """One checkpoint weight inside a quantized graph tensor.

    A packed tensor (q, k and v in one matrix, say) has several members, stacked along the output rows.
    `name` is the weight's name in the PyTorch model, `rows` its half-open row range in the packed matrix, and `digest`
    the SHA-256 of its logical codes, scales and zero points (see ``QuantizedTensor.digest``): the proof that the graph
    holds exactly the integers the quantizer chose.
    """

    name: str
    rows: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class QuantizedRecord:
    """One quantized matrix of a graph: ``<initializer>.codes``, ``.scale`` and, when asymmetric, ``.zero_point``.

    `codebook` names levels that are not evenly spaced (``nf4``), or is empty: codes are integers.
    """

    part: str
    initializer: str
    bits: int
    group_size: int
    symmetric: bool
    in_features: int
    members: tuple[QuantizedMember, ...]
    codebook: str = ""


@dataclass(frozen=True)
class KeptTensor:
    """A weight that was not quantized, with the reason."""

    name: str
    part: str
    dtype: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Everything an export says about itself; see docs/manifest.md for the JSON keys."""

    layout: str
    target: str
    created_by: dict[str, str]
    source: dict[str, Any]
    model: dict[str, Any]
    plan: dict[str, Any]
    parts: dict[str, PartFile]
    quantized: tuple[QuantizedRecord, ...]
    unquantized: tuple[KeptTensor, ...]
    files: dict[str, FileRecord] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The manifest as stable, indented JSON (no time stamps: the same inputs give the same bytes)."""
        body = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **dataclasses.asdict(self)}
        return json.dumps(body, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Manifest:
        """Rebuild a manifest from parsed JSON; raises `ArtifactError` on a foreign or newer file."""
        if data.get("format") != MANIFEST_FORMAT:
            raise ArtifactError(f"{MANIFEST_NAME} has format {data.get('format')!r}, expected {MANIFEST_FORMAT!r}")
        if not isinstance(data.get("version"), int) or data["version"] > MANIFEST_VERSION:
            raise ArtifactError(
                f"{MANIFEST_NAME} has version {data.get('version')!r}; this vlmexport reads up to {MANIFEST_VERSION}: "
                "upgrade vlmexport"
            )
        known = {f.name for f in dataclasses.fields(Manifest)}
        missing = sorted(known - data.keys() - {"calibration"})  # exports of the first release lack it
        unknown = sorted(data.keys() - known - {"format", "version"})
        if missing or unknown:
            raise ArtifactError(f"{MANIFEST_NAME} is damaged: missing keys {missing}, unknown keys {unknown}")
        return Manifest(
            layout=data["layout"],
            target=data["target"],
            created_by=data["created_by"],
            source=data["source"],
            model=data["model"],
            plan=data["plan"],
            parts={role: PartFile.from_dict(p) for role, p in data["parts"].items()},
            quantized=tuple(read_quantized_record(q) for q in data["quantized"]),
            unquantized=tuple(KeptTensor(**k) for k in data["unquantized"]),
            files={name: FileRecord(**f) for name, f in data["files"].items()},
            results=data["results"],
            calibration=data.get("calibration"),
        )


def read_quantized_record(data: dict[str, Any]) -> QuantizedRecord:
    """Read one entry of the manifest's ``quantized``."""
    members = tuple(QuantizedMember(m["name"], (m["rows"][0], m["rows"][1]), m["digest"]) for m in data["members"])
    return QuantizedRecord(**{**data, "members": members})


@dataclass(frozen=True)
class Artifact:
    """A finished export: its folder and its manifest."""

    path: Path
    manifest: Manifest

    def part_path(self, role: str) -> Path:
        """Absolute path of a part's graph; raises `ArtifactError` when the export has no such part."""
        if role not in self.manifest.parts:
            raise ArtifactError(f"{self.path}: the export has no part {role!r}; it has {sorted(self.manifest.parts)}")
        return safe_join(self.path, self.manifest.parts[role].file)


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, refused with `ArtifactError` when the result would leave `root`."""
    joined = (root / relative).resolve()
    if not joined.is_relative_to(root.resolve()):
        raise ArtifactError(f"{MANIFEST_NAME} names {relative!r}, which is outside {root}")
    return joined


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as a hex string, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(root: Path) -> dict[str, FileRecord]:
    """Digest and size of every file below `root` except the manifest itself, by path relative to `root`."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {p.relative_to(root).as_posix(): FileRecord(file_sha256(p), p.stat().st_size) for p in found}


def write_manifest(root: Path, manifest: Manifest) -> Artifact:
    """Write ``manifest.json`` into `root`, with the digests of the files that are there now."""
    complete = dataclasses.replace(manifest, files=record_files(root))
    (root / MANIFEST_NAME).write_text(complete.to_json(), encoding="utf-8")
    return Artifact(root, complete)


def open_artifact(path: Path, *, check_hashes: bool = True) -> Artifact:
    """Open an export folder.

    Raises `ArtifactError` when `path` is not an export, its manifest is damaged or newer, a listed file is missing,
    leaves the folder, or (with `check_hashes`) has other bytes than the manifest says.
    """
    manifest_path = path / MANIFEST_NAME
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; give the folder that `vlmexport onnx --out` wrote")
    if not manifest_path.is_file():
        raise ArtifactError(f"{path} is not a vlmexport export: it has no {MANIFEST_NAME}")
    try:
        data = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{manifest_path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{manifest_path} is not a JSON object")
    try:
        manifest = Manifest.from_dict(data)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest_path} is damaged: {error}") from error
    for name, record in manifest.files.items():
        file = safe_join(path, name)
        if not file.is_file():
            raise ArtifactError(f"{path}: {name} is listed in {MANIFEST_NAME} but missing")
        if file.stat().st_size != record.bytes or (check_hashes and file_sha256(file) != record.sha256):
            raise ArtifactError(f"{path}: {name} was changed after the export (its SHA-256 differs from the manifest)")
    return Artifact(path, manifest)


def record_result(artifact: Artifact, name: str, result: dict[str, Any]) -> Artifact:
    """Keep `result` (JSON data) as ``results.<name>`` of the export's manifest; nothing else in the folder changes.

    The manifest is replaced at once, so a reader sees the old one or the new one.
    """
    manifest = dataclasses.replace(artifact.manifest, results={**artifact.manifest.results, name: result})
    draft = artifact.path / f".{MANIFEST_NAME}.new"
    draft.write_text(manifest.to_json(), encoding="utf-8")
    draft.replace(artifact.path / MANIFEST_NAME)
    return Artifact(artifact.path, manifest)
