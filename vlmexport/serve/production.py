"""What to run an export with for real: the server that is made for its form, as a line to paste."""

from __future__ import annotations

import shlex
from pathlib import Path

from vlmexport.engines import TENSORRT_LAYOUT
from vlmexport.manifest import Artifact
from vlmexport.runtime.generate import GGUF_LAYOUT


def production_lines(artifact: Artifact) -> list[str]:
    """Lines for a person; the last is a command where there is one for this form."""
    folder, manifest = shlex.quote(str(artifact.path)), artifact.manifest
    if manifest.layout == GGUF_LAYOUT:
        text, vision = (shlex.quote(str(artifact.part_path(part))) for part in ("decoder", "vision_encoder"))
        return ["for production, llama.cpp's own server:", f"llama-server -m {text} --mmproj {vision} --jinja"]
    if manifest.layout == TENSORRT_LAYOUT:
        repository = Path(artifact.path) / "triton"
        if repository.is_dir():
            return [
                "for production, Triton with the repository in the export:",
                f"tritonserver --model-repository {shlex.quote(str(repository))}",
            ]
        return ["for production, export with --triton and serve the repository with Triton"]
    model = shlex.quote(str(manifest.source.get("model", "MODEL")))
    adapter = manifest.source.get("lora")
    lora = f" --lora {shlex.quote(str(adapter['path']))}" if adapter else ""
    return [
        f"for production, vLLM with a quantized checkpoint of the same model ({folder} is for ONNX Runtime):",
        f"vlmexport quantize --model {model}{lora} --out checkpoint && vllm serve checkpoint",
    ]
