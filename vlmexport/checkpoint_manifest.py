"""What a quantized checkpoint says about itself: ``vlmexport_quantization.json`` beside its weights.

Loaders ignore the file. `lower` fills it, `verify` judges from it; unknown versions are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmexport.errors import ArtifactError
from vlmexport.manifest import FileRecord, KeptTensor, file_sha256

CHECKPOINT_MANIFEST_NAME = "vlmexport_quantization.json"
CHECKPOINT_MANIFEST_FORMAT = "vlmexport-checkpoint"
CHECKPOINT_MANIFEST_VERSION = 1


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight ``shape [N, K]``: its name in the model, its module in the files, and how it was quantized.

    Of experts packed in one parameter, `name` is the parameter; the weight is `expert`'s rows from `first_row` on.
    `digest` is that of its logical codes, scales and zero points (``QuantizedTensor.digest``), taken before packing.
    """

    name: str
    module: str
    algorithm: str
    bits: int
    group_size: int
    symmetric: bool
    shape: tuple[int, int]
    digest: str
    expert: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class FoldedTensor:
    """A float that calibration changed: name in the model and in the files, and which rows as of a `StoredWeight`.

    `digest` is `tensor_digest` of what calibration made of it, taken before it is written.
    """

    name: str
    file_name: str
    digest: str
    expert: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class CheckpointManifest:
    """Everything about one checkpoint.

    `unquantized` weights carry the reason; `folded` are the floats that calibration changed.
    """

    checkpoint_format: str
    created_by: dict[str, str]
    source: dict[str, Any]
    plan: dict[str, Any]
    quantized: tuple[StoredWeight, ...]
    unquantized: tuple[KeptTensor, ...]
    folded: tuple[FoldedTensor, ...]
    calibration: dict[str, Any] | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as stable, indented JSON without time stamps."""
        head = {"format": CHECKPOINT_MANIFEST_FORMAT, "version": CHECKPOINT_MANIFEST_VERSION}
        return json.dumps({**head, **dataclasses.asdict(self)}, indent=1, sort_keys=True) + "\n"


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of `tensor`."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint_manifest(folder: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    """Write `manifest` into `folder` with the digests of the files that are there now, and return it with them."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKPOINT_MANIFEST_NAME)
    records = {name: FileRecord(file_sha256(folder / name), (folder / name).stat().st_size) for name in names}
    complete = dataclasses.replace(manifest, files=records)
    (folder / CHECKPOINT_MANIFEST_NAME).write_text(complete.to_json(), encoding="utf-8")
    return complete


def open_checkpoint(folder: Path) -> CheckpointManifest:
    """Read the manifest in `folder`; raises `ArtifactError` when there is none, or it is damaged or newer."""
    path = folder / CHECKPOINT_MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {CHECKPOINT_MANIFEST_NAME}; give a folder of `vlmexport quantize`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != CHECKPOINT_MANIFEST_FORMAT or data.pop("version") > CHECKPOINT_MANIFEST_VERSION:
            raise ArtifactError(f"{path} is of another tool or a newer vlmexport; this one reads version 1")
        return _from_dict(data)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error


def _from_dict(data: dict[str, Any]) -> CheckpointManifest:
    quantized = tuple(StoredWeight(**{**w, "shape": tuple(w["shape"])}) for w in data.pop("quantized"))
    unquantized = tuple(KeptTensor(**k) for k in data.pop("unquantized"))
    folded = tuple(FoldedTensor(**f) for f in data.pop("folded"))
    files = {name: FileRecord(**f) for name, f in data.pop("files").items()}
    return CheckpointManifest(quantized=quantized, unquantized=unquantized, folded=folded, files=files, **data)
