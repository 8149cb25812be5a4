"""Does every graph take and give what the split layout promises? Judged from the files alone, without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmexport.errors import ArtifactError
from vlmexport.genai_options import JOINED_LAYOUTS
from vlmexport.manifest import PREFILL_PART, Artifact, TensorSpec
from vlmexport.model.kv import KVGeometry, LayerKV, present_name
from vlmexport.model.merge import MergeSpec
from vlmexport.split.parts import Role
from vlmexport.verify.gates import Gate

_LAYER_DIMS = 4
# What each form of decoder takes beside embeddings and cache.
_BOOKKEEPING = {
    "gqa": ("attention_mask", "num_logits_to_keep"),
    "standard": ("attention_mask", "num_logits_to_keep", "position_ids"),
    "static": ("write_indices", "logits_positions"),
}


def check_structure(gate: Gate, artifact: Artifact, kv: KVGeometry) -> None:
    """One check per part, ``<part>/signature``: names, dtypes and dims against the contract and the manifest.

    A prompt graph takes and gives what the decoder does.

    `kv` is the cache geometry that the decoder must have: of the original model where it is at hand, since the manifest
    may be wrong in the same way as the graph.
    """
    roles: dict[str, Role] = {str(role): role for role in Role if role is not Role.ENCODER or _merge(artifact).crosses}
    if artifact.manifest.layout in JOINED_LAYOUTS:
        del roles[Role.PROJECTOR]  # the vision encoder holds it
    if PREFILL_PART in artifact.manifest.parts or "prefill" in artifact.manifest.model:
        roles[PREFILL_PART] = Role.DECODER
    for part, role in roles.items():
        with gate.guard(f"{part}/signature", part, "lowering"):
            if part not in artifact.manifest.parts:
                gate.verdict(f"{part}/signature", part, "lowering", ["the export has no such part"], "faults")
                continue
            faults = _signature_faults(artifact, part, role, kv)
            gate.verdict(f"{part}/signature", part, "lowering", faults, "faults")


def graph_signature(path: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of an ONNX file by name (weights are not read)."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {i.name for i in graph.initializer}
    inputs = {v.name: _spec(v) for v in graph.input if v.name not in weights}
    return inputs, {v.name: _spec(v) for v in graph.output}


def required_names(role: Role, artifact: Artifact, kv: KVGeometry) -> tuple[set[str], set[str]]:
    """Names of the inputs and outputs that docs/manifest.md requires of a part."""
    if role is Role.VISION_ENCODER:
        return set(), {"image_features" if artifact.manifest.layout in JOINED_LAYOUTS else "vision_features"}
    if role is Role.PROJECTOR:
        return {"vision_features"}, {"image_features"}
    if role is Role.EMBEDDING:
        return {"input_ids"}, {"inputs_embeds"}
    merge = _merge(artifact)
    if role is Role.ENCODER:
        return set(merge.encoder_inputs), merge.cross_inputs
    if artifact.manifest.model.get("output") == "embeddings":
        return {"inputs_embeds", "attention_mask", *merge.extras}, {"embeddings"}
    further = {*merge.extras, *merge.cross_inputs, *merge.cross_masks}
    inputs = {"inputs_embeds", *_BOOKKEEPING[_attention(artifact)], *further}
    inputs -= set(artifact.manifest.model.get("made_inputs", ()))
    inputs |= {*kv.pasts(), *(state.past for state in kv.states)}
    outputs = {"logits", *map(present_name, kv.pasts()), *(state.present for state in kv.states)}
    return inputs, outputs


def _merge(artifact: Artifact) -> MergeSpec:
    """The manifest's merge; one that asks nothing further of the parts where the manifest has none."""
    merge = artifact.manifest.model.get("merge")
    return MergeSpec(image_token_id=-1) if merge is None else MergeSpec.from_dict(merge)


def _attention(artifact: Artifact) -> str:
    """The manifest's form of the decoder; `ArtifactError` for one that docs/manifest.md does not know."""
    form = str(artifact.manifest.model.get("attention"))
    if form not in _BOOKKEEPING:
        raise ArtifactError(f"attention {form!r} is unknown; {', '.join(_BOOKKEEPING)}")
    return form


def _signature_faults(artifact: Artifact, part: str, role: Role, kv: KVGeometry) -> list[str]:
    inputs, outputs = graph_signature(artifact.part_path(part))
    need_inputs, need_outputs = required_names(role, artifact, kv)
    faults = [f"input {name} is missing" for name in sorted(need_inputs - inputs.keys())]
    faults += [f"output {name} is missing" for name in sorted(need_outputs - outputs.keys())]
    recorded = artifact.manifest.parts[part]
    faults += _against_manifest("input", inputs, recorded.inputs)
    faults += _against_manifest("output", outputs, recorded.outputs)
    if role is Role.DECODER:
        faults += _cache_faults({**inputs, **outputs}, kv, str(artifact.manifest.model["kv"]["dtype"]))
        if _attention(artifact) == "static":
            faults += [f"input {name} is none of this form" for name in sorted(inputs.keys() - need_inputs)]
            faults += _static_faults(inputs, outputs, artifact.manifest.model)
    return faults


def _static_faults(inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec], model: dict[str, Any]) -> list[str]:
    """Tensors of a decoder with a static cache whose dtype or dims are not those of docs/manifest.md.

    Past and present have the length of ``model.tensorrt.limits.max_seq``, all of them.
    """
    length = model["tensorrt"]["limits"]["max_seq"]
    wanted = {
        "inputs_embeds": ("float16", ("batch_size", "sequence_length", model["hidden_size"])),
        "write_indices": ("int64", ("batch_size",)),
        "logits_positions": ("int64", ("batch_size", "kept_length")),
        "logits": ("float32", ("batch_size", "kept_length", model["vocab_size"])),
    }
    cache = ("float16", ("batch_size", model["kv"]["heads"], length, model["kv"]["head_dim"]))
    faults = []
    for name, spec in {**inputs, **outputs}.items():
        dtype, dims = wanted.get(name, cache)
        if (spec.dtype, spec.dims) != (dtype, dims):
            faults.append(f"{name} is {spec.dtype} {list(spec.dims)}, expected {dtype} {list(dims)}")
    return faults


def _against_manifest(kind: str, found: dict[str, TensorSpec], recorded: tuple[TensorSpec, ...]) -> list[str]:
    faults = []
    for spec in recorded:
        other = found.get(spec.name)
        if other is None:
            faults.append(f"{kind} {spec.name} of the manifest is missing")
        elif (other.dtype, len(other.dims)) != (spec.dtype, len(spec.dims)) or _static_dims_differ(spec, other):
            faults.append(f"{kind} {spec.name} is {other.dtype} {list(other.dims)}, not {spec.dtype} {list(spec.dims)}")
    names = {spec.name for spec in recorded}
    return faults + [f"{kind} {name} is not in the manifest" for name in sorted(found.keys() - names)]


def _static_dims_differ(one: TensorSpec, other: TensorSpec) -> bool:
    pairs = zip(one.dims, other.dims, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _cache_faults(specs: dict[str, TensorSpec], kv: KVGeometry, dtype: str) -> list[str]:
    faults = []
    kept: dict[str, LayerKV] = kv.pasts()
    kept |= {present_name(past): layer for past, layer in kept.items()}
    for name, spec in specs.items():
        if not name.startswith(("past_key_values.", "present.")):
            continue
        if name not in kept:
            faults.append(f"{name} is of a layer that keeps none")
            continue
        dims, layer = spec.dims, kept[name]
        good = len(dims) == _LAYER_DIMS and (dims[1], dims[3]) == (layer.heads, layer.head_dim)
        if not good or (name.startswith("past") and dims[0] != "batch_size"):
            faults.append(
                f"{name} has dims {list(dims)}, expected [batch_size, {layer.heads}, length, {layer.head_dim}]"
            )
        if spec.dtype != dtype:
            faults.append(f"{name} is {spec.dtype}, the manifest's cache {dtype}")
    return faults


def _spec(value: object) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type  # type: ignore[attr-defined]
    dims = tuple(d.dim_value if d.HasField("dim_value") else str(d.dim_param) for d in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, dims)  # type: ignore[attr-defined]
