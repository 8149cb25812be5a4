"""An export of the right layout and an npm folder, both of a few bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmexport.manifest import Manifest, PartFile, write_manifest
from vlmexport.web.library import PACKAGE, RUNTIME, RUNTIME_VERSION, VERSION

WASM = tuple(f"ort-wasm-simd-threaded{kind}.{end}" for kind in (".asyncify", "") for end in ("mjs", "wasm"))


def write_export(folder: Path, layout: str = "transformersjs") -> Path:
    """Two dtypes of one graph each, one of them with external data."""
    graphs = {"q4": "onnx/decoder_model_merged_q4.onnx", "fp32": "onnx/decoder_model_merged.onnx"}
    (folder / "onnx").mkdir(parents=True)
    for index, file in enumerate(graphs.values()):
        (folder / file).write_bytes(bytes(range(100)) * (index + 1))
    (folder / "onnx" / "decoder_model_merged.onnx_data").write_bytes(b"d" * 1000)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (folder / "README.md").write_text("a card")
    (folder / "folded.safetensors").write_bytes(b"not for the client")
    parts = {name: {"decoder": PartFile(file, (), ())} for name, file in graphs.items()}
    variants = {
        name: {
            "decoder_dtype": "float32",
            "kv_bytes_per_token": 1,
            "parts": {"decoder": {"file": file, "inputs": [], "outputs": []}},
            "quantized": [],
            "unquantized": [],
            "folded": False,
        }
        for name, file in graphs.items()
    }
    model = {"variant": "q4", "variants": variants, "kv": {}}
    source = {"model": "/some/tiny"}
    write_manifest(folder, Manifest(layout, "cpu", {}, source, model, {}, parts["q4"], (), ()))
    return folder


def write_library(modules: Path, version: str = VERSION, runtime: str = RUNTIME_VERSION) -> Path:
    """A ``node_modules`` with the two packages; the folder of the library."""
    package = modules / PACKAGE
    (package / "dist").mkdir(parents=True)
    about = {"name": PACKAGE, "version": version, "dependencies": {RUNTIME: RUNTIME_VERSION}}
    (package / "package.json").write_text(json.dumps(about))
    (package / "dist" / "transformers.min.js").write_text("// the library")
    (modules / RUNTIME / "dist").mkdir(parents=True)
    (modules / RUNTIME / "package.json").write_text(json.dumps({"name": RUNTIME, "version": runtime}))
    for name in WASM:
        (modules / RUNTIME / "dist" / name).write_bytes(b"wasm")
    return package


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "tiny-web")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return write_library(tmp_path / "npm" / "node_modules")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No installation of this machine is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"
