"""Variants: several precisions of one model in one export, each seen as an export of its own.

The manifest's own ``parts``, ``quantized``, ``unquantized`` and ``model`` are those of the primary variant,
``model.variant``; ``model.variants`` has the same of every one of them by name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import ArtifactError, BadInputError
from vlmexport.manifest import (
    FOLDED_NAME,
    Artifact,
    KeptTensor,
    Manifest,
    PartFile,
    QuantizedRecord,
    read_quantized_record,
)


@dataclass(frozen=True)
class Variant:
    """What one variant of an export consists of.

    `decoder_dtype` is its numpy type of activations and KV cache, `kv_bytes_per_token` of one sequence; `folded` says
    that its weights are those that calibration changed (``folded.safetensors``).
    """

    decoder_dtype: str
    kv_bytes_per_token: int
    parts: dict[str, PartFile]
    quantized: tuple[QuantizedRecord, ...]
    unquantized: tuple[KeptTensor, ...]
    folded: bool

    def to_dict(self) -> dict[str, Any]:
        """The variant as JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Variant:
        """Read `to_dict`'s data back; KeyError or TypeError for other data."""
        return Variant(
            data["decoder_dtype"],
            data["kv_bytes_per_token"],
            {role: PartFile.from_dict(part) for role, part in data["parts"].items()},
            tuple(read_quantized_record(record) for record in data["quantized"]),
            tuple(KeptTensor(**kept) for kept in data["unquantized"]),
            data["folded"],
        )


def variant_names(manifest: Manifest) -> tuple[str, ...]:
    """Names of the export's variants, the primary one first; none where the export is of one precision."""
    names = sorted(manifest.model.get("variants", {}))
    return tuple(sorted(names, key=lambda name: name != manifest.model.get("variant")))


def as_variant(artifact: Artifact, name: str) -> Artifact:
    """The export as if it held the variant `name` alone.

    Raises `BadInputError` when there is no such variant, `ArtifactError` when the manifest's is damaged.
    """
    manifest = artifact.manifest
    names = variant_names(manifest)
    if name not in names:
        have = f"it has {', '.join(names)}" if names else "it is of one precision"
        raise BadInputError(f"{artifact.path} has no variant {name!r}; {have}")
    try:
        variant = Variant.from_dict(manifest.model["variants"][name])
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact.path}: variant {name} of the manifest is damaged: {error}") from error
    kv = {**manifest.model["kv"], "dtype": variant.decoder_dtype, "bytes_per_token": variant.kv_bytes_per_token}
    model = {**manifest.model, "variant": name, "decoder_dtype": variant.decoder_dtype, "kv": kv}
    files = {n: record for n, record in manifest.files.items() if variant.folded or n != FOLDED_NAME}
    seen = dataclasses.replace(
        manifest,
        model=model,
        parts=variant.parts,
        quantized=variant.quantized,
        unquantized=variant.unquantized,
        files=files,
    )
    return Artifact(artifact.path, seen)
