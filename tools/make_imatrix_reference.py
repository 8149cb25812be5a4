"""Write tests/quantize/ggml/imatrix_reference.json with the real llama-quantize.

    python tools/make_imatrix_reference.py PATH/TO/llama-quantize

It reads importance matrices that vlmexport wrote, of both forms (`example` of tests/quantize/ggml/test_imatrix.py); the
hash of each file and those of the tensors that it made with it are noted. About the tool, see make_gguf_references.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from make_gguf_references import quantize, tensors_of, write_source

from tests.quantize.ggml.sources import Run
from tests.quantize.ggml.test_imatrix import REFERENCE, WRITERS, example, source
from vlmexport.quantize.ggml.library import LLAMA_CPP_BUILD


def main() -> None:
    """Quantize once with each form."""
    tool = Path(sys.argv[1]).resolve()
    made: dict[str, object] = {"made_by": f"llama-quantize {LLAMA_CPP_BUILD}"}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.gguf"
        write_source(source(), plain)
        for form, write in WRITERS.items():
            file, target = Path(folder) / form, Path(folder) / f"{form}.gguf"
            write(file, example())
            said = quantize(tool, plain, file, Run("Q4_K_M", imatrix=True), target)
            if f"build {LLAMA_CPP_BUILD[1:]}," not in said or "importance matrix entries" not in said:
                raise SystemExit(f"{tool} is not of llama.cpp {LLAMA_CPP_BUILD}, or read no matrix: {said[:300]}")
            made[form] = {"file": hashlib.sha256(file.read_bytes()).hexdigest(), "tensors": tensors_of(target)}
    REFERENCE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
