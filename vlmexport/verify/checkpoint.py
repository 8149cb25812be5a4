"""The gate of a quantized checkpoint: its integers, what must not have changed, and transformers' own logits."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmexport.checkpoint_manifest import CheckpointManifest, open_checkpoint, tensor_digest
from vlmexport.model.checkpoint import read_checkpoint
from vlmexport.model.importers import read_packed
from vlmexport.model.importers.packed import PackedWeight
from vlmexport.model.importers.stored import StoredTensors
from vlmexport.model.load import load_vlm
from vlmexport.model.lora_names import ParameterNames
from vlmexport.model.source import resolve_source
from vlmexport.progress import Progress
from vlmexport.verify.checkpoint_codes import WeightFiles, read_checkpoint_codes
from vlmexport.verify.checkpoint_load import check_load
from vlmexport.verify.gates import Gate
from vlmexport.verify.result import ParityReport

LOSS_CHECK = "quantization/kl"
_LOSS_NOT_RUN = "the loss against the original: `vlmexport onnx` with the same --quant options judges it"


def verify_checkpoint(
    folder: Path, model: str, progress: Progress, *, lora: str | None = None, trust_remote_code: bool = False
) -> ParityReport:
    """Judge the checkpoint in `folder` against `model`, which it was made from with the adapter `lora` merged.

    Checks: the quantized weights are those of the plan, every row once; each is read back from the files by an
    independent decoder and has the digest of what the quantizer chose, or of what a quantized source held; floats that
    calibration changed are those that it made; every other tensor has the source's bytes, and every linear layer that
    is not quantized is named for the loader; transformers loads the checkpoint and computes the logits of the original
    model with the dequantized codes. What cannot run here is reported as not run, and so is the loss against a float
    original: these checks prove the files, not the choice of bits.
    """
    manifest = open_checkpoint(folder)
    with progress.stage("verify") as stage:
        gate = Gate(lambda name: stage.advance(description=name))
        faults = [fault for _, _, fault in read_checkpoint_codes(folder, manifest) if fault is not None]
        names = [f"{f.weight}: {f.reason}" for f in faults]
        gate.verdict("codes/all", "decoder", "lowering", names, "weights that differ")
        gate.verdict("codes/complete", "decoder", "lowering", miscounted_weights(manifest), "weights")
        packed = source_codes(model, trust_remote_code=trust_remote_code)
        if packed:
            gate.verdict("codes/kept", "decoder", "lowering", changed_codes(packed, manifest), "weights that differ")
        changed = changed_tensors(folder, model, manifest, packed, lora=lora, trust_remote_code=trust_remote_code)
        gate.verdict("source/unchanged", "model", "lowering", changed, "tensors")
        if manifest.folded:
            gate.verdict("source/folded", "model", "lowering", changed_folds(folder, manifest), "tensors that differ")
        gate.verdict("config/ignore", "model", "lowering", unlisted_layers(folder, manifest), "layers not listed")
        check_load(gate, folder, model, manifest, lora=lora, trust_remote_code=trust_remote_code)
        if not packed:
            gate.not_run(LOSS_CHECK, "model", "quantization", _LOSS_NOT_RUN)
    return ParityReport(tuple(gate.checks))


def source_codes(model: str, *, trust_remote_code: bool = False) -> dict[str, PackedWeight]:
    """The packed weights of a `model` that came quantized, by their names in its files; none for float weights."""
    checkpoint = read_checkpoint(resolve_source(model), trust_remote_code=trust_remote_code)
    if checkpoint.quantization is None:
        return {}
    packed = read_packed(checkpoint.quantization, StoredTensors(checkpoint.weight_files))
    return {weight.name: weight for weight in packed.weights}


def miscounted_weights(manifest: CheckpointManifest) -> list[str]:
    """Weights that the plan quantizes and whose rows are not all recorded exactly once, and unplanned ones.

    The rows of experts packed in one parameter are counted through all of them.
    """
    planned = {w["name"]: w["shape"] for w in manifest.plan["weights"] if w["scheme"] is not None}
    blocks: dict[str, list[tuple[int, int]]] = {}
    for record in manifest.quantized:
        height = planned.get(record.name, record.shape)[-2]
        start = (record.expert or 0) * height + record.first_row
        blocks.setdefault(record.name, []).append((start, start + record.shape[0]))
    faults = [f"{name} is quantized and not planned" for name in sorted(blocks.keys() - planned.keys())]
    for name, shape in planned.items():
        rows, ends = math.prod(shape[:-1]), [(0, 0), *sorted(blocks.get(name, []))]
        gapless = all(before[1] == after[0] for before, after in itertools.pairwise(ends))
        if not gapless or ends[-1][1] != rows:
            faults.append(f"{name} has {len(ends) - 1} matrices recorded, which are not each of its {rows} rows once")
    return faults


def changed_codes(packed: Mapping[str, PackedWeight], manifest: CheckpointManifest) -> list[str]:
    """Packed weights of the source that are not quantized in the checkpoint, or whose recorded digest is another."""
    digests = {f"{w.module}.weight": w.digest for w in manifest.quantized}
    faults = []
    for name, weight in packed.items():
        if name not in digests:
            faults.append(f"{name} is missing")
        elif weight.decode().digest() != digests[name]:
            faults.append(f"{name} has other codes, scales or zero points than the source")
    return faults


def changed_tensors(
    folder: Path,
    model: str,
    manifest: CheckpointManifest,
    packed: Mapping[str, PackedWeight] | None = None,
    *,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Tensors of the source that are neither quantized nor folded, and are missing or not the same bytes.

    `packed` are the source's own quantized weights, which `changed_codes` judges. Safetensors files that the model is
    not loaded from (``consolidated.safetensors``, adapters) are not part of it. Of a model with the adapter `lora`, the
    source's tensors are those with it merged.
    """
    checkpoint = read_checkpoint(resolve_source(model), trust_remote_code=trust_remote_code)
    source = WeightFiles(checkpoint.path, checkpoint.weight_files)
    written = WeightFiles(folder)
    replaced = {f"{w.module}.weight" for w in manifest.quantized} | {f.file_name for f in manifest.folded}
    replaced |= {part for weight in (packed or {}).values() for part in weight.parts}
    empty = {f"{name.removesuffix('weight')}bias" for name in packed or {}}  # AutoGPTQ's, where the model has no bias
    merged = {} if lora is None else _merged_tensors(model, lora, source.names(), trust_remote_code)
    faults = []
    for name in source.names():
        if name in replaced:
            continue
        if name not in written.names():
            if name not in empty or source(name).any():
                faults.append(f"{name} is missing")
        elif not _same_bytes(merged.get(name, source(name)), written(name)):
            faults.append(f"{name} differs")
    return faults


def _merged_tensors(model: str, lora: str, stored: Iterable[str], trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """The tensors of `stored` (names in the files) that the adapter changes, as they are with it merged."""
    vlm = load_vlm(model, lora=lora, trust_remote_code=trust_remote_code)
    names, known = ParameterNames(vlm.model), dict(vlm.model.named_parameters(remove_duplicate=False))
    changed = set() if vlm.lora is None else set(vlm.lora.changed)
    places = {key: names.loaded_as(key) for key in stored}
    return {key: known[place].detach() for key, place in places.items() if place in changed}


def changed_folds(folder: Path, manifest: CheckpointManifest) -> list[str]:
    """Folded floats that are not in the files as calibration made them: no comparison with the source shows that."""
    written = WeightFiles(folder)
    known = set(written.names())
    return [
        f"{fold.file_name} " + ("differs" if fold.file_name in known else "is missing")
        for fold in manifest.folded
        if fold.file_name not in known or tensor_digest(written(fold.file_name)) != fold.digest
    ]


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def unlisted_layers(folder: Path, manifest: CheckpointManifest) -> list[str]:
    """Linear layers that are not quantized and that the config does not tell a loader to leave alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    skipped = _SKIPS[config["quant_method"]](config)
    return [name for name in manifest.plan["unquantized_linears"] if not skipped(name)]


def _listed(key: str) -> Callable[[dict[str, Any]], Callable[[str], bool]]:
    return lambda config: set(config[key]).__contains__


def _gptq_skips(config: dict[str, Any]) -> Callable[[str], bool]:
    patterns = [key.removeprefix("-:") for key in config["dynamic"] if key.startswith("-:")]
    quantized = set(config["modules_in_block_to_quantize"][0])
    return lambda name: name not in quantized and any(re.match(pattern, name) for pattern in patterns)


_SKIPS: dict[str, Callable[[dict[str, Any]], Callable[[str], bool]]] = {
    "compressed-tensors": _listed("ignore"),
    "gptq": _gptq_skips,
    "awq": _listed("modules_to_not_convert"),
    "bitsandbytes": _listed("llm_int8_skip_modules"),
    "torchao": _listed("modules_to_not_convert"),
}
