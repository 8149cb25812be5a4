"""Write a model's checkpoint again with its decoder quantized: one source tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlmexport.checkpoint_manifest import FoldedTensor, StoredWeight, tensor_digest
from vlmexport.checkpoint_plan import CheckpointPlan
from vlmexport.lower.checkpoint.experts import Place
from vlmexport.lower.checkpoint.layout import Layout, Subject, make_layout
from vlmexport.lower.checkpoint.names import Names, stored_tensors
from vlmexport.lower.checkpoint.writer import SafetensorsWriter
from vlmexport.model.checkpoint import read_checkpoint, without_quantization
from vlmexport.progress import Progress
from vlmexport.quantize.weights import DecoderWeights

if TYPE_CHECKING:
    from vlmexport.model.load import VLM


@dataclass(frozen=True)
class EmittedCheckpoint:
    """What was written: the quantized weights, and the floats that calibration changed."""

    quantized: tuple[StoredWeight, ...]
    folded: tuple[FoldedTensor, ...]


def emit_checkpoint(
    vlm: VLM, plan: CheckpointPlan, names: Names, weights: DecoderWeights, folder: Path, progress: Progress
) -> EmittedCheckpoint:
    """Write weight files and ``config.json`` into `folder`.

    Tensors that are neither quantized nor folded nor changed by a merged adapter are copied byte for byte; the others
    keep their dtype. `names` are those of `names_for`. Raises `BadInputError` for a quantized weight that the format
    cannot hold.
    """
    checkpoint = read_checkpoint(vlm.path, trust_remote_code=vlm.trust_remote_code)
    places = names.places((*plan.schemes, *weights.folds))
    replaced = _replaced_parts(vlm, places)
    merged = _merged_tensors(vlm, names)
    layout = make_layout(Subject(plan, weights, names, vlm.facts.dtype))
    writer = SafetensorsWriter(folder)
    quantized: list[StoredWeight] = []
    folded: list[FoldedTensor] = []
    steps = sum(place.weight in plan.schemes for place in places.values())
    with progress.stage("write weights", total=steps) as stage:
        for key, tensor in stored_tensors(checkpoint.weight_files):
            place = places.get(key)
            if place is not None and place.weight in plan.schemes:
                name = names.in_files.get(place.weight, key)
                quantized.append(_write_quantized(writer, layout, plan, weights, place, name.removesuffix(".weight")))
                stage.advance(description=place.label)
            elif key in replaced:
                continue
            elif place is not None:
                changed = place.tensor(weights).to(tensor.dtype)
                folded.append(FoldedTensor(place.weight, key, tensor_digest(changed), place.expert, place.start))
                writer.add(key, changed)
            else:
                writer.add(key, merged.get(key, tensor))
    writer.finish(layout.metadata())
    config = {**without_quantization(checkpoint.config), "quantization_config": layout.config()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return EmittedCheckpoint(tuple(quantized), tuple(folded))


def _merged_tensors(vlm: VLM, names: Names) -> dict[str, torch.Tensor]:
    """What a merged adapter made of the tensors of the files, by their names there (see `check_merged`)."""
    if vlm.lora is None:
        return {}
    known = dict(vlm.model.named_parameters(remove_duplicate=False))
    return {names.in_files[name]: known[name].detach() for name in vlm.lora.changed if name in names.in_files}


def _replaced_parts(vlm: VLM, places: dict[str, Place]) -> set[str]:
    """The tensors of codes that came with the checkpoint; each weight's first one now stands for it in `places`.

    The others have no successor.
    """
    packed = {} if vlm.quantized is None else vlm.quantized.packed
    for name, weight in packed.items():
        places.pop(weight.name, None)
        places[weight.parts[0]] = Place(name)
    return {part for weight in packed.values() for part in weight.parts}


def _write_quantized(
    writer: SafetensorsWriter, layout: Layout, plan: CheckpointPlan, weights: DecoderWeights, place: Place, module: str
) -> StoredWeight:
    scheme, tensor = plan.schemes[place.weight], place.codes(weights)
    for suffix, value in layout.pack(place.label, tensor, scheme).items():
        writer.add(f"{module}.{suffix}", value)
    return StoredWeight(
        name=place.weight,
        module=module,
        algorithm=scheme.algorithm,
        bits=tensor.bits,
        group_size=tensor.group_size,
        symmetric=tensor.zero_point is None,
        shape=tensor.shape,
        digest=tensor.digest(),
        expert=place.expert,
        first_row=place.start,
    )
