"""Run llama.cpp's convert_hf_to_gguf.py on a model with a tokenizer of its own: SOURCES MODEL [OPTIONS].

The converter knows tokenizers by a hash of ids, which a random model's cannot match; only that look-up is answered.
"""

import runpy
import sys
from pathlib import Path

sources = Path(sys.argv[1])
sys.path[:0] = [str(sources), str(sources / "gguf-py")]

from conversion.base import TextModel  # noqa: E402 (it lies in the sources)

TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"  # type: ignore[method-assign]
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")
