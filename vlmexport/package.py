"""Package: the model's own files, the manifest and the model card complete an export folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport import __version__
from vlmexport.card import model_card
from vlmexport.lower.result import Emitted
from vlmexport.manifest import Artifact, Manifest, file_sha256, write_manifest
from vlmexport.model.remote import code_files, is_remote, names_processor_code
from vlmexport.plan import ExportPlan
from vlmexport.target import Target

if TYPE_CHECKING:
    from vlmexport.model.importers.packed import QuantizedCheckpoint
    from vlmexport.model.load import VLM
    from vlmexport.model.lora import MergedAdapter
    from vlmexport.split.parts import Split

# What a runtime or processor reads beside the weights: configs, tokenizer, processor and chat template.
_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "LICENSE*")
_NOT_COPIED = (
    "model.safetensors.index.json", "manifest.json", "adapter_config.json",
    "quantize_config.json", "quant_config.json", "vlmexport_quantization.json",
    "quantization_plan.json", "engines.json",
)  # fmt: skip
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "gguf")
_OPTIONAL_TOOLS = ("xllamacpp", "tensorrt-rtx")


def package(
    vlm: VLM,
    split: Split,
    plan: ExportPlan,
    target: Target,
    emitted: Emitted,
    folder: Path,
    calibration: dict[str, Any] | None = None,
    *,
    facts: dict[str, Any] | None = None,
    card: Callable[[Manifest, Path], str] = model_card,
) -> Artifact:
    """Complete `folder` (which holds the graphs) and write its manifest; `calibration` is what it says of that.

    `facts` are what the layout adds to the manifest's ``model``; `card` writes the README.
    """
    copy_model_files(vlm.path, folder)
    for name, text in emitted.root_files.items():
        (folder / name).write_text(text, encoding="utf-8")
    manifest = Manifest(
        layout=plan.options.layout,
        target=plan.options.target,
        created_by=tool_versions(),
        source=source_facts(vlm),
        model={**_model(vlm, split, plan, target, emitted), **(facts or {})},
        plan=plan.to_dict(),
        parts=emitted.parts,
        quantized=emitted.quantized,
        unquantized=emitted.unquantized,
        results={"verify": None, "bench": None},
        calibration=calibration,
    )
    (folder / "README.md").write_text(card(manifest, vlm.path), encoding="utf-8")
    return write_manifest(folder, manifest)


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy configs, processor, tokenizer, chat template and licence, and the Python files that a config names."""
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in _NOT_COPIED:
                shutil.copyfile(file, folder / file.name)
    for name, file in code_files(source).items():
        shutil.copyfile(file, folder / name)
    _drop_quantization_config(folder / "config.json")


def _drop_quantization_config(config: Path) -> None:
    """Of a checkpoint that came quantized: loaders of the export must not look for packed weights."""
    data = json.loads(config.read_text(encoding="utf-8"))
    parts = [part for part in (data, data.get("text_config")) if isinstance(part, dict)]
    if [part for part in parts if part.pop("quantization_config", None)]:  # every part, not the first one only
        config.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def tool_versions() -> dict[str, str]:
    """Versions of vlmexport and of what it works with."""
    installed = [name for name in _OPTIONAL_TOOLS if importlib.util.find_spec(name.replace("-", "_")) is not None]
    return {"vlmexport": __version__, **{name: importlib.metadata.version(name) for name in (*_TOOLS, *installed)}}


def source_facts(vlm: VLM) -> dict[str, Any]:
    """What was exported, with the digests of its files."""
    files = sorted([*vlm.path.glob("*.safetensors"), vlm.path / "config.json"])
    return {
        "model": vlm.source,
        "architecture": vlm.facts.architecture,
        "model_type": vlm.facts.model_type,
        "dtype": vlm.facts.dtype,
        "files": {file.name: file_sha256(file) for file in files},
        **({} if vlm.quantized is None else {"quantization": _quantization(vlm.quantized)}),
        **({} if vlm.lora is None else {"lora": _lora(vlm.lora)}),
        **({"remote_code": _code(vlm)} if code_files(vlm.path) else {}),
    }


def _code(vlm: VLM) -> dict[str, Any]:
    """The Python files that ship with the source: whether the model's class is one of theirs, and the processor's."""
    files = {name: file_sha256(file) for name, file in code_files(vlm.path).items()}
    return {"files": files, "model": is_remote(vlm.model), "processor": names_processor_code(vlm.path)}


def _lora(merged: MergedAdapter) -> dict[str, Any]:
    """Which adapter was merged, with the digests of its files: `verify` merges it again."""
    return {
        "path": merged.source,
        "files": {file.name: file_sha256(file) for file in merged.files},
        "changed": len(merged.changed),
        "untied": merged.untied,
        "notes": list(merged.notes),
    }


def _quantization(kept: QuantizedCheckpoint) -> dict[str, Any]:
    """How the source came quantized, and what of its recipe the export does not carry on."""
    return {"method": kept.method, "summary": kept.summary, "weights": len(kept.formats), "notes": list(kept.notes)}


def _model(vlm: VLM, split: Split, plan: ExportPlan, target: Target, emitted: Emitted) -> dict[str, Any]:
    cache_digest = emitted.cache_digest
    dtype = {"fp16": "float16", "fp32": "float32"}[plan.decoder_dtype]
    return {
        "architecture": vlm.facts.architecture,
        "model_type": vlm.facts.model_type,
        "hidden_size": vlm.facts.hidden_size,
        "vocab_size": vlm.facts.vocab_size,
        "kv": {
            **split.kv.to_dict(),
            "dtype": "int8" if cache_digest else dtype,
            "bytes_per_token": plan.kv_bytes_per_token,
            **({"granularity": "per_channel", "scales_digest": cache_digest} if cache_digest else {}),
        },
        "merge": split.merge.to_dict(),
        "replay_difference": split.replay_difference,
        "attention": plan.options.attention,
        "padding": "any" if plan.options.attention == "standard" else "right",
        "eos_token_ids": list(vlm.facts.eos_token_ids),
        "decoder_dtype": dtype,
        "accuracy_level": target.onnx.accuracy_level,
        **({"output": vlm.facts.output} if vlm.facts.output != "logits" else {}),
        **({"prefill": emitted.prefill} if emitted.prefill else {}),
        **emitted.facts,
    }
