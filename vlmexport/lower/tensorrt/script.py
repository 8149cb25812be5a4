"""``build_engines.sh``, ``build_engines.py`` and ``engines.json``: how the target machine builds the engines itself.

TensorRT proper builds only where its GPU is. The two scripts are copied as they are (`templates`); what to build, for
which GPU and with which profiles, they read from ``engines.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vlmexport.engines import EngineSpec, Flavour, graph_files
from vlmexport.gpu import Gpu
from vlmexport.manifest import PartFile, safe_join

JOB_NAME = "engines.json"
JOB_FORMAT = "vlmexport-build"
JOB_VERSION = 1
SCRIPTS = ("build_engines.sh", "build_engines.py")
# The versions that the scripts were written for.
VERSIONS: dict[Flavour, str] = {"trt": "11.4.0.106", "rtx": "1.7.1.116"}


def write_build_scripts(
    folder: Path,
    manifest_model: Mapping[str, Any],
    parts: Mapping[str, PartFile],
    specs: Sequence[EngineSpec],
    gpu: Gpu,
) -> tuple[str, ...]:
    """Write the scripts and their job into the export in `folder`; the names of the files.

    `manifest_model` is the manifest's ``model.tensorrt``. Raises `ArtifactError` for a graph that is not there or that
    keeps its data outside the folder.
    """
    for name in SCRIPTS:
        target = folder / name
        target.write_text(template(name), encoding="utf-8")
        target.chmod(0o755)
    job = build_job(folder, manifest_model, parts, specs, gpu)
    (folder / JOB_NAME).write_text(json.dumps(job, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return (*SCRIPTS, JOB_NAME)


def build_job(
    folder: Path,
    manifest_model: Mapping[str, Any],
    parts: Mapping[str, PartFile],
    specs: Sequence[EngineSpec],
    gpu: Gpu,
) -> dict[str, Any]:
    """``engines.json`` as JSON data: the GPU, the limits, the libraries' versions and every engine.

    An engine's ``files`` are its graph and the graph's data, by their paths beside the graph; ``dynamic`` the inputs
    whose shapes its profiles set.
    """
    return {
        "format": JOB_FORMAT,
        "version": JOB_VERSION,
        "gpu": {
            "name": gpu.name,
            "title": gpu.title,
            "compute_capability": gpu.compute_capability,
            "rtx": gpu.rtx,
        },
        "limits": manifest_model["limits"],
        "versions": VERSIONS,
        "engines": [_entry(folder, parts[spec.part], spec) for spec in specs],
    }


def _entry(folder: Path, part: PartFile, spec: EngineSpec) -> dict[str, Any]:
    graph = safe_join(folder, part.file)
    dynamic = [t.name for t in part.inputs if any(isinstance(d, str) for d in t.dims)]
    return {"spec": spec.to_dict(), "graph": part.file, "files": list(graph_files(graph)), "dynamic": dynamic}


def template(name: str) -> str:
    """A file of `templates` as text."""
    return resources.files("vlmexport.lower.tensorrt.templates").joinpath(name).read_text(encoding="utf-8")
