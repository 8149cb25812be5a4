"""Where transformers.js comes from: an npm folder of this machine, or a package mirror that the user names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmexport.errors import BadInputError, NotPossibleHereError

PACKAGE = "@huggingface/transformers"
RUNTIME = "onnxruntime-web"
# What the page was tested with; the library says which runtime it belongs to.
VERSION, RUNTIME_VERSION = "4.3.1", "1.31.0-dev.20260914-8d85527a0"
MAJOR = VERSION.split(".")[0]
_SCRIPT = "dist/transformers.min.js"
# The library takes the first pair, and the second in a Safari that has no WebGPU.
_WASM = tuple(f"ort-wasm-simd-threaded{kind}.{end}" for kind in (".asyncify", "") for end in ("mjs", "wasm"))
_LOCAL_HOSTS = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Library:
    """What the page loads: addresses of the script and of the folder with the WebAssembly files.

    `files` are those that the site itself holds, by name; `origin` is the other place that they come from ("": none).
    """

    version: str
    script: str
    wasm: str
    files: dict[str, Path]
    origin: str = ""


def find_library(named: Path | None = None) -> Library:
    """The library in the folder `named`, or the first in a ``node_modules`` of Node's own search, then of the cache.

    Raises `NotPossibleHereError` when there is none, `BadInputError` for a folder that does not hold it, or holds
    another version than the page can use.
    """
    if named is not None:
        return _read(named)
    here = Path.cwd()
    for folder in (*(parent for parent in (here, *here.parents)), cache_folder()):
        package = folder / "node_modules" / PACKAGE
        if (package / "package.json").is_file():
            return _read(package)
    raise NotPossibleHereError(
        f"{PACKAGE} is not on this machine; `npm install --ignore-scripts --prefix {cache_folder()} "
        f"{PACKAGE}@{VERSION}` puts it where it is found, or name its folder with --transformersjs"
    )


def cache_folder() -> Path:
    """Where one installation serves every working directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmexport" / "web"


def mirror(address: str) -> Library:
    """The library at a mirror of npm packages (``https://cdn.jsdelivr.net/npm``), in the versions that were tested.

    Raises `BadInputError` for an address that is not https (http is for this machine alone).
    """
    parts = urlsplit(address)
    plain = parts.scheme == "http" and parts.hostname in _LOCAL_HOSTS
    # What would end a source in a policy has no place in an address.
    odd = (
        parts.query
        or parts.fragment
        or "@" in parts.netloc
        or any(c in address for c in " ;,'\"\\")
        or not parts.netloc
    )
    if odd or not (parts.scheme == "https" or plain):
        raise BadInputError(
            f"--cdn {address}: give the https address of an npm mirror, as https://cdn.jsdelivr.net/npm"
        )
    base = address.rstrip("/")
    return Library(
        VERSION,
        f"{base}/{PACKAGE}@{VERSION}/{_SCRIPT}",
        f"{base}/{RUNTIME}@{RUNTIME_VERSION}/dist/",
        {},
        f"{parts.scheme}://{parts.netloc}",
    )


def _read(package: Path) -> Library:
    about = _about(package, PACKAGE)
    version = str(about.get("version", ""))
    if version.split(".")[0] != MAJOR:
        raise BadInputError(f"{package}: the page needs {PACKAGE} {MAJOR}.x ({VERSION} was tested), not {version}")
    runtime = _runtime(package)
    wanted, found = about.get("dependencies", {}).get(RUNTIME), _about(runtime, RUNTIME).get("version")
    if wanted != found:
        raise BadInputError(f"{runtime} has version {found}, but {PACKAGE} {version} belongs to {wanted}")
    files = {"transformers.js": package / _SCRIPT, **{f"wasm/{name}": runtime / "dist" / name for name in _WASM}}
    if missing := [path for path in files.values() if not path.is_file()]:
        raise BadInputError(f"{missing[0]} is missing; install {PACKAGE} again")
    return Library(version, "transformers.js", "wasm/", files)


def _runtime(package: Path) -> Path:
    """The folder of the runtime beside the library or inside it, as Node finds it."""
    places = [package / "node_modules" / RUNTIME]
    places += [parent / RUNTIME for parent in package.absolute().parents if parent.name == "node_modules"]
    found = next((place for place in places if (place / "package.json").is_file()), None)
    if found is None:
        raise BadInputError(f"{package}: {RUNTIME} is not beside it; install {PACKAGE} with npm")
    return found


def _about(package: Path, name: str) -> dict[str, Any]:
    """The ``package.json`` of `package`, which must be `name`'s."""
    try:
        about = json.loads((package / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{package} is not the folder of {name}: it has no readable package.json") from error
    if not isinstance(about, dict) or about.get("name") != name:
        raise BadInputError(f"{package} is not the folder of {name}; name node_modules/{name}")
    return about
