"""The library comes from this machine, from a mirror that was named, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.web.conftest import WASM, write_library
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.web.library import RUNTIME, VERSION, cache_folder, find_library, mirror


def test_the_tested_versions_are_those_of_the_clients() -> None:
    lock = json.loads((Path(__file__).parents[1] / "clients" / "package-lock.json").read_text())["packages"]
    assert lock["node_modules/@huggingface/transformers"]["version"] == VERSION
    found = mirror("https://mirror.example/npm")
    assert f"{RUNTIME}@{lock['node_modules/onnxruntime-web']['version']}/" in found.wasm


def test_a_named_folder_is_taken(library: Path) -> None:
    found = find_library(library)
    assert (found.version, found.script, found.wasm, found.origin) == (VERSION, "transformers.js", "wasm/", "")
    assert set(found.files) == {"transformers.js", *(f"wasm/{name}" for name in WASM)}


def test_without_a_name_it_is_found_above_and_then_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(NotPossibleHereError, match=r"npm install .*@huggingface/transformers@4\.3\.1"):
        find_library()
    cached = write_library(cache_folder() / "node_modules")
    assert find_library().files["transformers.js"] == cached / "dist" / "transformers.min.js"
    above = write_library(tmp_path / "node_modules")
    assert find_library().files["transformers.js"] == above / "dist" / "transformers.min.js"


def test_other_packages_and_versions_are_refused(tmp_path: Path, library: Path) -> None:
    with pytest.raises(BadInputError, match=r"needs @huggingface/transformers 4\.x .* not 3\.8\.1"):
        find_library(write_library(tmp_path / "old" / "node_modules", version="3.8.1"))
    with pytest.raises(BadInputError, match=r"has version 1\.0\.0, but .* belongs to"):
        find_library(write_library(tmp_path / "mixed" / "node_modules", runtime="1.0.0"))
    with pytest.raises(BadInputError, match="it has no readable package"):
        find_library(tmp_path)
    with pytest.raises(BadInputError, match="is not the folder of @huggingface/transformers"):
        find_library(library.parents[1] / RUNTIME)


def test_a_damaged_installation_is_refused(library: Path) -> None:
    runtime = library.parents[1] / RUNTIME
    (runtime / "dist" / WASM[1]).unlink()
    with pytest.raises(BadInputError, match="is missing; install"):
        find_library(library)
    (runtime / "package.json").unlink()
    with pytest.raises(BadInputError, match="onnxruntime-web is not beside it"):
        find_library(library)


def test_a_mirror_is_one_origin() -> None:
    found = mirror("https://cdn.jsdelivr.net/npm/")
    assert found.origin == "https://cdn.jsdelivr.net"
    assert found.script == f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{VERSION}/dist/transformers.min.js"
    assert found.files == {}
    assert mirror("http://127.0.0.1:9/npm").origin == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "address",
    ["http://cdn.jsdelivr.net/npm", "cdn.jsdelivr.net", "https://", "https://a@b/npm", "https://x/;y", "https://x/?y"],
)
def test_what_is_no_mirror_is_refused(address: str) -> None:
    with pytest.raises(BadInputError, match="--cdn"):
        mirror(address)
