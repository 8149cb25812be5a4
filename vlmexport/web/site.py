"""The files of a site: page, library and model by the path they are asked for, and nothing else of the disk."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vlmexport.dtypes import WEB_LAYOUT
from vlmexport.errors import BadInputError
from vlmexport.families.transformersjs import WEB_FAMILIES
from vlmexport.manifest import Artifact, open_artifact, safe_join
from vlmexport.model.json_files import read_json_if_there
from vlmexport.serve.facts import facts
from vlmexport.variants import as_variant, variant_names
from vlmexport.web.library import Library
from vlmexport.workspace import build_beside, check_destination, move_into_place

FACTS = "site.json"
_MODEL = "model"
_PAGE = {
    "index.html": ("vlmexport.web", "index.html"),
    "page.css": ("vlmexport.serve", "page.css"),
    "web.css": ("vlmexport.web", "web.css"),
    "page.js": ("vlmexport.web", "page.js"),
    "worker.js": ("vlmexport.web", "worker.js"),
}
# Without these two a browser gives a page no shared memory, and WebAssembly one thread.
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Site:
    """`files` by path from the site's root (a file, or its bytes), and the headers that every answer has."""

    name: str
    files: dict[str, Path | bytes]
    headers: dict[str, str]


def open_web_export(path: Path) -> Artifact:
    """The export in `path`.

    Raises `ArtifactError` for a folder that is no export, `BadInputError` for an export of another layout.
    """
    artifact = open_artifact(path, check_hashes=False)
    if artifact.manifest.layout != WEB_LAYOUT:
        raise BadInputError(
            f"{path} has layout {artifact.manifest.layout}, which no browser loads; make one with "
            f"`vlmexport onnx --model MODEL --layout {WEB_LAYOUT} --out DIR`"
        )
    return artifact


def make_site(artifact: Artifact, library: Library) -> Site:
    """The site of an export of `open_web_export`, with the page's library."""
    name = artifact.path.resolve().name
    about = {"name": name, **facts(artifact), **_choices(artifact), "library": library.script, "wasm": library.wasm}
    files: dict[str, Path | bytes] = {FACTS: json.dumps(about, indent=1).encode() + b"\n"}
    for file, (package, source) in _PAGE.items():
        files[file] = resources.files(package).joinpath("static", source).read_bytes()
    files |= library.files
    files |= {f"{_MODEL}/{file}": safe_join(artifact.path, file) for file in _model_files(artifact)}
    return Site(name, files, {**ISOLATION, "Content-Security-Policy": _policy(library)})


def write_site(site: Site, out: Path, *, force: bool = False) -> None:
    """Write `site` into the folder `out`, for any static host; large files are hard links where the disk allows.

    ``_headers`` says the headers to hosts that read such a file. Raises `BadInputError` when `out` exists and is not
    to be replaced.
    """
    check_destination(out, force, FACTS)
    with build_beside(out) as folder:
        for name, source in site.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                _link(source, target)
        lines = [f"  {name}: {value}" for name, value in site.headers.items()]
        (folder / "_headers").write_text("\n".join(["/*", *lines, ""]), encoding="utf-8")
        move_into_place(folder, out)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _model_files(artifact: Artifact) -> list[str]:
    """What the client reads, and what goes with the weights wherever they go (the card, a licence)."""
    return [
        name
        for name in artifact.manifest.files
        if name.startswith("onnx/") or ("/" not in name and not name.endswith((".safetensors", ".html", ".xml")))
    ]


def _choices(artifact: Artifact) -> dict[str, Any]:
    """The dtypes of the export with the bytes that each loads, the default one first, and how the client is called."""
    names = variant_names(artifact.manifest)
    dtypes = [{"name": name, "bytes": _bytes(artifact, name)} for name in names]
    family = WEB_FAMILIES.get(str(read_json_if_there(artifact.path / "config.json").get("model_type")))
    return {"dtypes": dtypes, "images_first": family is not None and family.images_first}


def _bytes(artifact: Artifact, dtype: str) -> int:
    graphs = tuple(part.file for part in as_variant(artifact, dtype).manifest.parts.values())
    files = artifact.manifest.files
    return sum(record.bytes for name, record in files.items() if name.removesuffix("_data") in graphs)


def _policy(library: Library) -> str:
    """What the page may load: its own files, and those of the mirror that the user named."""
    other = f" {library.origin} blob:" if library.origin else ""
    workers = " blob:" if library.origin else ""
    return (
        f"default-src 'none'; script-src 'self' 'wasm-unsafe-eval'{other}; worker-src 'self'{workers}; "
        f"style-src 'self'; img-src 'self' data: blob:; connect-src 'self'{other}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
