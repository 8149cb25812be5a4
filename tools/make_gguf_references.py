"""Write tests/quantize/ggml/references/ with the real llama-quantize.

    python tools/make_gguf_references.py PATH/TO/llama-quantize

It must be of llama.cpp b11549, as the pinned xllamacpp is (its sdist holds the source; build with
``-DLLAMA_BUILD_NUMBER=11549 -DGGML_NATIVE=OFF``, target ``llama-quantize``). Every source of
tests/quantize/ggml/sources.py is written as a GGUF file with its importance matrix, quantized by every run of its, and
the type and the start of the SHA-256 of each tensor noted in the order of the file. Minutes, for the smallest types.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "tests" / "quantize" / "ggml" / "references"
HASH_DIGITS = 12
sys.path.insert(0, str(ROOT))

from tests.quantize.ggml.sources import Run, Source, all_sources  # noqa: E402
from vlmexport.quantize.ggml.library import LLAMA_CPP_BUILD  # noqa: E402


def write_source(source: Source, path: Path) -> None:
    """The file that llama-quantize reads."""
    writer = gguf.GGUFWriter(str(path), source.facts.arch)
    for key, value in source.metadata.items():
        _add(writer, f"{source.facts.arch}.{key}", value)
    for name in source.shapes:
        values = source.values(name)
        writer.add_tensor(name, values if source.stored_type(name) == "F32" else values.astype(np.float16))
    _finish(writer)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def write_imatrix(source: Source, path: Path) -> None:
    """Importances in llama.cpp's GGUF form: sums of squares, and counts of 1."""
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["references"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in source.shapes:
        importance = source.importance(name)
        if importance is not None:
            rows = np.atleast_2d(importance)
            writer.add_tensor(f"{name}.in_sum2", rows)
            writer.add_tensor(f"{name}.counts", np.ones((rows.shape[0], 1), np.float32))
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(tool: Path, source: Path, imatrix: Path, run: Run, target: Path) -> str:
    """Run llama-quantize; its banner."""
    options = ["--imatrix", str(imatrix)] if run.imatrix else []
    for pattern, kind in run.overrides:
        options += ["--tensor-type", f"{pattern}={kind}"]
    command = [str(tool), *options, str(source), str(target), run.quant, "2"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def tensors_of(path: Path) -> dict[str, str]:
    """``name: "TYPE hash"`` in the order of the file."""
    reader = gguf.GGUFReader(str(path))
    return {
        t.name: f"{t.tensor_type.name} {hashlib.sha256(t.data.tobytes()).hexdigest()[:HASH_DIGITS]}"
        for t in reader.tensors
    }


def reference(tool: Path, source: Source, folder: Path) -> dict[str, Any]:
    """The names in the order of the files, and of every run the type and hash of each."""
    plain, imatrix, target = folder / "plain.gguf", folder / "imatrix.gguf", folder / "made.gguf"
    write_source(source, plain)
    write_imatrix(source, imatrix)
    order: list[str] = []
    runs = {}
    for run in source.runs:
        banner = quantize(tool, plain, imatrix, run, target)
        if f"build {LLAMA_CPP_BUILD[1:]}," not in banner:
            raise SystemExit(f"{tool} is not of llama.cpp {LLAMA_CPP_BUILD}: {banner[:300]}")
        made = tensors_of(target)
        if order and order != list(made):
            raise SystemExit(f"{source.name} {run.key}: the order of tensors depends on the file type")
        order = list(made)
        runs[run.key] = " | ".join(made.values())
        print(source.name, run.key, flush=True)
    return {"made_by": f"llama-quantize {LLAMA_CPP_BUILD}", "order": order, "runs": runs}


def main() -> None:
    """Write one file per source (of those named after the tool, if any)."""
    tool, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    TARGET.mkdir(exist_ok=True)
    for source in (s for s in all_sources() if not names or s.name in names):
        with tempfile.TemporaryDirectory() as folder:
            made = reference(tool, source, Path(folder))
        (TARGET / f"{source.name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
