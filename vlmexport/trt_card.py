"""The model card of a TensorRT export: what it is, what was built and what was not, and how to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmexport.card import adapter_words, decoder_words, kept_table, metadata
from vlmexport.card_proof import proof_section
from vlmexport.engines import LIBRARIES
from vlmexport.manifest import Manifest


def trt_card(manifest: Manifest, source: Path) -> str:
    """README.md of the export. Lines are markdown."""
    facts = manifest.model["tensorrt"]
    limits = facts["limits"]
    graphs = ", ".join(f"`{part.file}`" for part in manifest.parts.values())
    lines = [*metadata(manifest, source), "", f"# {Path(manifest.source['model']).name}: TensorRT export", ""]
    lines += [
        f"`{manifest.source['architecture']}` split into {graphs} by vlmexport {manifest.created_by['vlmexport']}, in "
        f"standard operators of ONNX opset 24 for TensorRT, for {facts['gpu_title']} (compute capability "
        f"{facts['compute_capability']}).{adapter_words(manifest.source)}",
        "",
        decoder_words(manifest),
        "",
        f"Made for up to {limits['max_batch']} sequence(s) of {limits['max_seq']} tokens (the length of the static KV "
        f"cache), and {limits['max_images']} image(s) at once, tiles included.",
        "",
        "## Engines",
        "",
        *_engines(facts),
        "",
        "## Check it",
        "",
        "```sh",
        "# the graphs in ONNX Runtime on the CPU; the engines too, where the GPU and their library are",
        "vlmexport verify . --model PATH_OR_ID_OF_THE_ORIGINAL",
        "# ONNX Runtime on the CPU",
        'vlmexport run . --image picture.png --prompt "What is in this picture?"',
        "```",
        "",
        "The graphs' inputs, outputs and the way they fit together are in `manifest.json`.",
        "",
        *proof_section(manifest.results.get("verify")),
        "",
        *_prediction(facts),
        *kept_table(manifest),
    ]
    return "\n".join(lines) + "\n"


def _engines(facts: dict[str, Any]) -> list[str]:
    """Which engines are in the folder, and what to do where there are none. Nothing here says that one was run."""
    built = facts["built"]
    title = facts["gpu_title"]
    names = ", ".join(f"`{spec['name']}`" for spec in facts["engines"])
    script = f"On a machine with {title} and TensorRT proper, `./build_engines.sh` builds {names} into `engines/`."
    if not built["places"]:
        return [f"Engine not built: {built['reason']}.", "", script]
    places = ", ".join(f"`engines/{place}/`" for place in built["places"])
    library = LIBRARIES[built["flavour"]]
    return [
        f"{names} in {places}, built by {library} {built['version']} without running them. They load only in that very "
        "version, on the compute capabilities that each sidecar (`.engine.json`) names.",
        "",
        script,
    ]


def _prediction(facts: dict[str, Any]) -> list[str]:
    lines = facts["prediction"]["lines"]
    return ["## What data sheets allow", "", "Bounds, not measurements.", "", "```text", *lines, "```", ""]
