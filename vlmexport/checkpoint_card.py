"""The model card of a quantized checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vlmexport.card import adapter_words, code_words, lineage
from vlmexport.card_proof import proof_section
from vlmexport.checkpoint_manifest import CheckpointManifest

_LOADERS = {
    "compressed-tensors": "transformers (with `compressed-tensors`) and vLLM (4 and 8 bits)",
    "gptq": "vLLM (symmetric, 4 and 8 bits) and transformers (with `optimum` and `gptqmodel`)",
    "awq": "vLLM and transformers (with `gptqmodel`)",
    "bnb-nf4": "transformers and vLLM (with `bitsandbytes`)",
    "torchao": "transformers (with `torchao`)",
}


def checkpoint_card(manifest: CheckpointManifest, source: Path) -> str:
    """README.md: hub metadata, what is quantized and how, what loads it, and what was kept."""
    name = Path(manifest.source["model"]).name
    kept_from = manifest.plan.get("kept_from", "")
    chosen = f"codes kept from the {kept_from} checkpoint" if kept_from else ""
    schemes = Counter(
        f"{chosen or w.algorithm}, {w.bits} bits, {'symmetric' if w.symmetric else 'asymmetric'}, "
        f"groups of {w.group_size}"
        for w in manifest.quantized
    )
    kept = Counter((k.part, k.dtype, k.reason) for k in manifest.unquantized)
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags:", "- vlmexport",
        f"- {manifest.checkpoint_format}", *lineage(source / "README.md", manifest.source["model"]), "---", "",
        f"# {name}: {manifest.checkpoint_format}", "",
        f"`{manifest.source['architecture']}` quantized by vlmexport {manifest.created_by['vlmexport']}; loads in "
        f"{_LOADERS[manifest.checkpoint_format]}.{adapter_words(manifest.source)}"
        f"{code_words(manifest.source)}", "",
        *(f"- {count} matrices: {scheme}" for scheme, count in schemes.items()), "",
        "Scales are float16 or float32. A runtime that computes in bfloat16 rounds them to 8 bits; in float16 codes "
        "mean exactly what was chosen.", "",
        *proof_section(manifest.results.get("verify")), "",
        "## Weights kept unquantized", "", "| part | dtype | count | reason |", "|---|---|---|---|",
        *(f"| {part} | {dtype} | {n} | {reason} |" for (part, dtype, reason), n in sorted(kept.items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
