"""What a page says of the export that it shows."""

from __future__ import annotations

from pathlib import Path

from vlmexport.manifest import Artifact


def facts(artifact: Artifact) -> dict[str, str]:
    """One line, `words`: the model, the form of the export, its size and what the gate says."""
    manifest = artifact.manifest
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    report = manifest.results.get("verify")
    gate = "the gate has not judged it" if report is None else f"gate: {report['status']}"
    source = Path(str(manifest.source.get("model", ""))).name
    return {"words": f"{source}, {manifest.layout} for {manifest.target}, {size:.1f} MB; {gate}"}
