"""The model card of an export: what it is, how to run it, what was kept and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmexport.card_proof import proof_section
from vlmexport.card_usage import library, runtime, tags, usage
from vlmexport.manifest import Manifest, QuantizedRecord
from vlmexport.model.source import hub_id

_LINEAGE_KEYS = ("license", "license_name", "license_link", "language", "base_model")


def model_card(manifest: Manifest, source: Path) -> str:
    """README.md of the export: hub metadata, then the numbers and commands a user needs. Lines are markdown."""
    lines = [*metadata(manifest, source), "", f"# {Path(manifest.source['model']).name}: ONNX export", ""]
    graphs = ", ".join(f"`{part.file}`" for part in manifest.parts.values())
    lines += [
        f"`{manifest.source['architecture']}` split into {graphs} by "
        f"vlmexport {manifest.created_by['vlmexport']} for {runtime(manifest.layout)} (`{manifest.target}` profile)."
        f"{adapter_words(manifest.source)}{code_words(manifest.source)}",
        "",
        _quantization(manifest),
        "",
        "## Run it",
        "",
        *usage(manifest, source),
        "vlmexport verify . --model PATH_OR_ID_OF_THE_ORIGINAL",
        "```",
        "",
        "The graphs' inputs, outputs and the way they fit together are in `manifest.json`; the decoder needs "
        f"{'right padding' if manifest.model['padding'] == 'right' else 'no particular padding'}.",
        "",
        *proof_section(manifest.results.get("verify")),
        "",
        *kept_table(manifest),
    ]
    return "\n".join(lines) + "\n"


def kept_table(manifest: Manifest) -> list[str]:
    """The section on the weights that are not quantized, alike ones counted."""
    counts = Counter((k.part, k.dtype, k.reason) for k in manifest.unquantized)
    rows = [f"| {part} | {dtype} | {n} | {reason} |" for (part, dtype, reason), n in sorted(counts.items())]
    return ["## Weights kept unquantized", "", "| part | dtype | count | reason |", "|---|---|---|---|", *rows]


def metadata(manifest: Manifest, source: Path) -> list[str]:
    """The card's header for the hub: library, task, tags, licence and lineage."""
    kept = lineage(source / "README.md", manifest.source["model"])
    named = [f"- {tag}" for tag in ("onnx", "vlmexport", *tags(manifest.layout))]
    lines = ["---", f"library_name: {library(manifest.layout)}", f"pipeline_tag: {_task(manifest)}", "tags:", *named]
    return [*lines, *kept, "---"]


def _task(manifest: Manifest) -> str:
    """The hub's name of what the model does."""
    embeds = manifest.model.get("output") == "embeddings"
    return "visual-document-retrieval" if embeds else "image-text-to-text"


def lineage(readme: Path, model: str) -> list[str]:
    """Licence and lineage of the source model's own card as lines of YAML, in its order.

    `model` is what the user typed: a hub id becomes the base model, of which this is a quantized form. What a local
    model's card calls its base stays the base. A header that is no YAML is left out.
    """
    import yaml

    kept = {key: value for key, value in _header(readme).items() if key in _LINEAGE_KEYS and value}
    if (hub := hub_id(model)) is not None:
        kept |= {"base_model": hub, "base_model_relation": "quantized"}
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""
    return text.splitlines()


def _header(readme: Path) -> dict[str, Any]:
    import yaml

    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if not text or text[0].strip() != "---" or "---" not in text[1:]:
        return {}
    try:
        found = yaml.safe_load("\n".join(text[1 : text.index("---", 1)]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def adapter_words(source: Mapping[str, Any]) -> str:
    """A sentence on the LoRA adapter in the weights, with a space before it; nothing without one."""
    merged = source.get("lora")
    return f" The LoRA adapter `{Path(merged['path']).name}` is merged into the weights." if merged else ""


def code_words(source: Mapping[str, Any]) -> str:
    """A sentence on Python files that came with the model, with a space before it; nothing without any."""
    code = source.get("remote_code")
    if not code:
        return ""
    needs = "runs them, so that it loads with `trust_remote_code` only" if code["processor"] else "does not need them"
    return f" Python files came with the model ({', '.join(code['files'])}); its processor {needs}."


def _quantization(manifest: Manifest) -> str:
    """What is quantized and where the codes are from; then the cache and the prompt graph where they are INT8."""
    cache = ["The KV cache holds 8-bit integers."] if manifest.model["kv"]["dtype"] == "int8" else []
    prompts = "Prompts run through a graph of their own, `decoder_prefill.onnx`, with INT8 products."
    more = [*cache, *([prompts] if manifest.model.get("prefill") else [])]
    return " ".join([decoder_words(manifest), *more])


def decoder_words(manifest: Manifest) -> str:
    """What of the decoder is quantized, how, and whose codes they are."""
    own = [record for record in manifest.quantized if record.part == "decoder"]
    if not own:
        return f"No weight of the decoder is quantized; it computes in {manifest.model['decoder_dtype']}."
    kinds = Counter(f"{_kind(r)}, groups of {r.group_size}" for r in own)
    told = "; ".join(f"{n} matrices {kind}" for kind, n in kinds.items())
    source = manifest.source.get("quantization")
    kept = ""
    if source:
        again = sum(
            w["action"] == "quantize" and "--requantize" in w["reason"] for w in manifest.plan.get("weights", ())
        )
        kept = f" Codes and scales are those of the quantized checkpoint ({source['summary']})"
        kept += f", but for {again} matrices that were rounded again (--requantize)." if again else "."
    return f"Decoder: {told}.{kept} Vision encoder, projector and embedding are not quantized."


def _kind(record: QuantizedRecord) -> str:
    if record.codebook:
        return record.codebook.upper()
    return f"{record.bits}-bit {'symmetric' if record.symmetric else 'asymmetric'}"
