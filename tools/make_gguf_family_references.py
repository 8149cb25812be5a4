"""Write tests/families/references/ with llama.cpp's own converter.

    python tools/make_gguf_family_references.py PATH/TO/llama.cpp [FAMILY ...]

The source must be b11549's, as the pinned xllamacpp is (its sdist holds it). Every tiny checkpoint of
tests/families/converter_references.py is converted at F32, text and mmproj; shapes, types and the start of the SHA-256
of each tensor are noted, and the keys that are the architecture's own. Two things of the converter are replaced, for
tiny tokenizers: the pre-tokenizer by the hash of a vocabulary, and the search for a tokenizer.model. Minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.families.converter_references import BUILDERS, FOLDER, fingerprint  # noqa: E402

# transformers 5 saves these otherwise than the checkpoints of the hub, which is what the converter reads.
_HUB_NAMES = (("vision_tower.", "vision_tower.vision_model."),)
_TRANSPOSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_ARCHITECTURES = {"lfm2": "Lfm2ForCausalLM"}
_CONVERTER = """
import sys
root, checkpoint, out, *more = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import convert_hf_to_gguf as driver
from conversion.base import TextModel

def no_file(self):
    raise FileNotFoundError("tokenizer.model")

TextModel._create_vocab_sentencepiece = no_file
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", out, "--outtype", "f32", *more]
driver.main()
"""


def hub_form(folder: Path) -> None:
    """Rewrite a checkpoint of transformers 5 as the hub has it."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for ours, theirs in _HUB_NAMES:
            name = name.replace(ours, theirs) if ours in name and theirs not in name else name
        tensors[name] = tensor.transpose(1, 2).contiguous() if name.endswith(_TRANSPOSED) else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if architecture := _ARCHITECTURES.get(config["text_config"]["model_type"]):
        config["text_config"]["architectures"] = [architecture]
        (folder / "config.json").write_text(json.dumps(config))


def convert(llama_cpp: Path, folder: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run the converter; its tensors and keys."""
    subprocess.run(
        [sys.executable, "-c", _CONVERTER, str(llama_cpp), str(folder), str(out), *more],
        check=True,
        capture_output=True,
    )
    reader = gguf.GGUFReader(out)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    own = {key: value for key, value in keys.items() if not key.startswith(("GGUF.", "general.", "tokenizer."))}
    tensors = {t.name: [list(t.data.shape), t.tensor_type.name, fingerprint(t.data)] for t in reader.tensors}
    return {"tensors": tensors, "metadata": own}


def main() -> None:
    """Write the references of the families named, or of all."""
    llama_cpp, families = Path(sys.argv[1]), sys.argv[2:] or list(BUILDERS)
    FOLDER.mkdir(exist_ok=True)
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            folder = BUILDERS[family](Path(name) / family)
            hub_form(folder)
            made = {
                "text": convert(llama_cpp, folder, Path(name) / "text.gguf"),
                "mmproj": convert(llama_cpp, folder, Path(name) / "mmproj.gguf", "--mmproj"),
            }
        (FOLDER / f"{family}.json").write_text(json.dumps(made, indent=0, sort_keys=True) + "\n")
        print(f"{family}: {len(made['text']['tensors'])} + {len(made['mmproj']['tensors'])} tensors", flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
