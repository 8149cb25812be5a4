"""The model card of a GGUF export."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from pathlib import Path

from vlmexport.card import adapter_words, lineage
from vlmexport.card_proof import proof_section
from vlmexport.gguf_options import File, GgufPlan
from vlmexport.manifest import Manifest


def gguf_card(manifest: Manifest, plan: GgufPlan, name: str, source: Path, imatrix: str = "") -> str:
    """README.md: hub metadata, the lines that run it in llama.cpp, what is stored as what, and what to know.

    `name` is the model's, `source` its folder; `imatrix` says where an importance matrix is from, empty without one.
    """
    files = (manifest.parts["decoder"].file, manifest.parts["vision_encoder"].file)
    text, mmproj = (shlex.quote(file) for file in files)
    notes = [*manifest.model["gguf"]["notes"], *(manifest.calibration or {}).get("warnings", [])]
    lines = [
        "---", "library_name: gguf", "pipeline_tag: image-text-to-text", "tags:", "- gguf", "- llama.cpp",
        "- vlmexport", *lineage(source / "README.md", manifest.source["model"]), "---", "",
        f"# {name}: GGUF", "",
        f"`{manifest.source['architecture']}` by vlmexport {manifest.created_by['vlmexport']} for llama.cpp: "
        f"`{text}` (architecture {plan.arch}, {plan.bits_per_weight('text'):.2f} bits per weight) and `{mmproj}` "
        f"(projector {plan.projector}, {plan.bits_per_weight('mmproj'):.2f} bits per weight)."
        f"{adapter_words(manifest.source)}", "",
        "## Run it", "", "```sh",
        f'llama-mtmd-cli -m {text} --mmproj {mmproj} --jinja --image picture.png -p "What is in this picture?"',
        f"llama-server -m {text} --mmproj {mmproj} --jinja",
        'vlmexport run . --image picture.png --prompt "What is in this picture?"',
        "vlmexport verify . --model PATH_OR_ID_OF_THE_ORIGINAL", "```", "",
        *proof_section(manifest.results.get("verify")), "",
        "## What is stored as what", "", "| file | type | tensors | values | reason |", "|---|---|---|---|---|",
        *_rows(plan, "text", files[0]), *_rows(plan, "mmproj", files[1]), "",
    ]  # fmt: skip
    lines += [*_calibration(manifest, plan, imatrix), ""]
    if notes:
        lines += ["## To know", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _rows(plan: GgufPlan, file: File, name: str) -> list[str]:
    tensors = plan.of(file)
    kinds = Counter((t.type, t.reason) for t in tensors)
    return [
        f"| {name} | {kind} | {count} | {_values(plan, file, kind, reason):,} | {reason} |"
        for (kind, reason), count in sorted(kinds.items())
    ]


def _values(plan: GgufPlan, file: File, kind: str, reason: str) -> int:
    return sum(math.prod(t.shape) for t in plan.of(file) if (t.type, t.reason) == (kind, reason))


def _calibration(manifest: Manifest, plan: GgufPlan, imatrix: str) -> list[str]:
    """What chose the codes, what weighed the columns, and whether scales were moved."""
    lines = []
    if plan.schemes:
        kept, report = manifest.source.get("quantization"), manifest.calibration
        made = f"those of the checkpoint ({kept['summary']})" if kept else next(iter(plan.schemes.values())).algorithm
        share = (
            ""
            if report is None
            else f", calibrated on {report['samples']} samples ({report['image_share']:.0%} image tokens)"
        )
        lines.append(f"Codes: {made}{share}, stored without loss.")
    if imatrix:
        lines.append(f"Importance matrix: {imatrix}.")
    if plan.options.smooth == "awq":
        lines.append("AWQ's scales were folded into the weights first.")
    return lines
