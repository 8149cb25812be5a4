"""Write tests/quantize/ggml/converter.json with llama.cpp's own converter.

    python tools/make_gguf_converter_reference.py PATH/TO/llama.cpp

The folder is llama.cpp's source of b11549 (the sdist of the pinned xllamacpp holds it). The bundled model is converted
with every ``--outtype``, text and vision; the type and the start of the SHA-256 of each tensor are noted. The
vocabulary is left out: the converter knows tokenizers by a hash, and not this one. Two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from make_gguf_references import ROOT, tensors_of

from vlmexport.demo import model_dir
from vlmexport.quantize.ggml.library import LLAMA_CPP_BUILD

TARGET = ROOT / "tests" / "quantize" / "ggml" / "converter.json"
TYPES = ("F32", "F16", "BF16", "Q8_0")
_WITHOUT_VOCABULARY = """
import runpy, sys
from conversion.llama import LlamaModel
LlamaModel.set_vocab = lambda self: None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(source: Path, name: str, options: list[str], target: Path) -> None:
    """One call of convert_hf_to_gguf.py."""
    script = [str(source / "convert_hf_to_gguf.py"), str(model_dir()), "--outtype", name.lower(), *options]
    code = f"import sys; sys.argv = {[*script, '--outfile', str(target)]!r}{_WITHOUT_VOCABULARY}"
    paths = os.pathsep.join(map(str, (source / "gguf-py", source)))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode(errors="replace")[-2000:])


def main() -> None:
    """Convert, and write the file."""
    source = Path(sys.argv[1]).resolve()
    files = {}
    for half, options in {"text": [], "mmproj": ["--mmproj"]}.items():
        for name in TYPES:
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / "made.gguf"
                convert(source, name, options, made)
                files[f"{half} {name}"] = tensors_of(made)
    data = {"made_by": f"convert_hf_to_gguf.py {LLAMA_CPP_BUILD}", "files": files}
    TARGET.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
