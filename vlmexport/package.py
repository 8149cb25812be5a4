"""Package: the model's own files, the manifest and the model card complete an export folder."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport import __version__
from vlmexport.card import model_card
from vlmexport.lower.result import Emitted
from vlmexport.manifest import Artifact, Manifest, file_sha256, write_manifest
from vlmexport.plan import ExportPlan
from vlmexport.target import Target

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

# What a runtime or processor reads beside the weights: configs, tokenizer, processor and chat template.
_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "LICENSE*")
_NOT_COPIED = ("model.safetensors.index.json", "manifest.json", "adapter_config.json")
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime")


def package(vlm: VLM, split: Split, plan: ExportPlan, target: Target, emitted: Emitted, folder: Path) -> Artifact:
    """Complete `folder` (which holds the graphs) and write its manifest."""
    _copy_model_files(vlm.path, folder)
    manifest = Manifest(
        layout=plan.options.layout,
        target=plan.options.target,
        created_by=_versions(),
        source=_source(vlm),
        model=_model(vlm, split, plan, target),
        plan=plan.to_dict(),
        parts=emitted.parts,
        quantized=emitted.quantized,
        unquantized=emitted.unquantized,
        results={"verify": None, "bench": None},
    )
    (folder / "README.md").write_text(model_card(manifest, vlm.path), encoding="utf-8")
    return write_manifest(folder, manifest)


def _copy_model_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in _NOT_COPIED:
                shutil.copyfile(file, folder / file.name)


def _versions() -> dict[str, str]:
    return {"vlmexport": __version__, **{name: importlib.metadata.version(name) for name in _TOOLS}}


def _source(vlm: VLM) -> dict[str, Any]:
    files = sorted([*vlm.path.glob("*.safetensors"), vlm.path / "config.json"])
    return {
        "model": vlm.source,
        "architecture": vlm.facts.architecture,
        "model_type": vlm.facts.model_type,
        "dtype": vlm.facts.dtype,
        "files": {file.name: file_sha256(file) for file in files},
    }


def _model(vlm: VLM, split: Split, plan: ExportPlan, target: Target) -> dict[str, Any]:
    kv = vlm.facts.kv
    dtype = {"fp16": "float16", "fp32": "float32"}[plan.decoder_dtype]
    return {
        "architecture": vlm.facts.architecture,
        "model_type": vlm.facts.model_type,
        "hidden_size": vlm.facts.hidden_size,
        "vocab_size": vlm.facts.vocab_size,
        "kv": {"layers": kv.layers, "heads": kv.heads, "head_dim": kv.head_dim, "dtype": dtype},
        "merge": split.merge.to_dict(),
        "replay_difference": split.replay_difference,
        "attention": plan.options.attention,
        "padding": "right" if plan.options.attention == "gqa" else "any",
        "eos_token_ids": list(vlm.facts.eos_token_ids),
        "decoder_dtype": dtype,
        "accuracy_level": target.onnx.accuracy_level,
    }
