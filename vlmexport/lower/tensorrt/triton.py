"""A Triton model repository for an export: one model for each part, and ``vlm``, which answers prompts with them.

``tensorrt``: the engines that ``build_engines.sh`` makes with TensorRT proper; the decoder is run by a model of its own
(`templates/triton_decoder.py`), because Triton's TensorRT backend gives the cache's input and output different memory
(its ``instance_state.cc`` allocates one buffer per tensor), and TensorRT's cache update demands the same.
``onnxruntime``: the ONNX files as they are, with the cache passed from call to call.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlmexport.engines import EngineSpec, TrtLimits, graph_files
from vlmexport.errors import ArtifactError, BadInputError
from vlmexport.lower.tensorrt.script import VERSIONS, template
from vlmexport.lower.tensorrt.triton_check import CACHE_PREFIXES, check_triton
from vlmexport.lower.tensorrt.triton_config import TYPES, config_text, model_config, parameters, tensor
from vlmexport.manifest import PartFile, TensorSpec, safe_join
from vlmexport.model.merge import MergeSpec
from vlmexport.trt_shapes import merge_refusal

TRITON_FOLDER = "triton"
# Read by build_engines.py: where each engine goes, below the repository.
PLACES_NAME = "engines.json"
ROLES = ("vision_encoder", "projector", "embed_tokens", "decoder")
DEFAULT_MAX_TOKENS = 256
# A decoder whose client went away is free for others after this time.
_IDLE_MICROSECONDS = 60_000_000
Backend: TypeAlias = Literal["tensorrt", "onnxruntime"]


def write_triton(
    folder: Path,
    parts: Mapping[str, PartFile],
    specs: Sequence[EngineSpec],
    limits: TrtLimits,
    backend: Backend,
    *,
    merge: MergeSpec,
    eos_token_ids: Sequence[int],
) -> tuple[str, ...]:
    """Write ``triton/`` into the export in `folder`; the names of its files, relative to `folder`.

    What was there is replaced. Raises `BadInputError` for a model that ``vlm`` cannot serve, `ArtifactError` when the
    repository does not agree with the graphs.
    """
    missing = [role for role in ROLES if role not in parts]
    if missing:
        raise BadInputError(f"a Triton repository is not written for a model without {missing[0]}; leave out --triton")
    if refusal := merge_refusal(merge):
        raise BadInputError(refusal)
    root = folder / TRITON_FOLDER
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for role in ROLES:
        if role == "decoder" and backend == "tensorrt":
            _write_engine_decoder(root, parts[role], specs)
        else:
            _write_part(root, folder, role, parts[role], backend)
    _write_features(root, parts)
    _write_vlm(root, parts, limits, eos_token_ids, merge, keeps_cache=backend == "tensorrt")
    if backend == "tensorrt":
        _write_json(root / PLACES_NAME, {spec.name: [_plan_path(spec)] for spec in specs})
    (root / "README.md").write_text(_readme(backend, limits, parts), encoding="utf-8")
    faults = check_triton(root, {role: parts[role] for role in ROLES})
    if faults:
        raise ArtifactError(f"{root}: {faults[0]} ({len(faults)} faults)")
    return tuple(sorted(p.relative_to(folder).as_posix() for p in root.rglob("*") if p.is_file()))


def _write_part(root: Path, folder: Path, role: str, part: PartFile, backend: Backend) -> None:
    fields: dict[str, Any] = {"platform": "tensorrt_plan", "default_model_filename": "model.plan"}
    fields["instance_group"] = [{"count": 1, "kind": "KIND_GPU", "profile": ["0"]}]
    if backend == "onnxruntime":
        graph = safe_join(folder, part.file)
        fields = {"backend": "onnxruntime", "default_model_filename": graph.name}
        for name in graph_files(graph):
            _copy(graph.parent / name, root / role / "1" / name)
    _write_config(root, role, _tensors(part.inputs), _tensors(part.outputs), **fields)


def _copy(source: Path, target: Path) -> None:
    """A copy, though it takes space: onnx reads no external data that has a second name or is a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _plan_name(spec: EngineSpec) -> str:
    return "model.plan" if spec.name == spec.part else f"{spec.profiles[0].name}.plan"


def _plan_path(spec: EngineSpec) -> str:
    return f"{spec.part}/1/{_plan_name(spec)}"


def _write_engine_decoder(root: Path, part: PartFile, specs: Sequence[EngineSpec]) -> None:
    """The decoder that keeps its cache: without it in its inputs and outputs, one sequence at a time."""
    calls = {
        profile.name: [_plan_name(spec), index]
        for spec in specs
        if spec.part == "decoder"
        for index, profile in enumerate(spec.profiles)
    }
    if calls.keys() != {"prefill", "decode"}:
        raise ArtifactError(f"the decoder's engines have the profiles {sorted(calls)}, not prefill and decode")
    code = template("triton_decoder.py")
    fields: dict[str, Any] = {
        "backend": "python",
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "sequence_batching": {"max_sequence_idle_microseconds": _IDLE_MICROSECONDS, "direct": {}},
        "parameters": parameters({"calls": json.dumps(calls)}),
    }
    inputs, outputs = (
        [t for t in side if not t.name.startswith(CACHE_PREFIXES)] for side in (part.inputs, part.outputs)
    )
    _write_config(root, "decoder", _tensors(inputs), _tensors(outputs), **fields)
    _write_code(root, "decoder", code)


def _write_features(root: Path, parts: Mapping[str, PartFile]) -> None:
    """The ensemble ``image_features``: pixels through encoder and projector, which share the names of the features."""
    encoder, projector = parts["vision_encoder"], parts["projector"]
    between = {t.name: t.name for t in projector.inputs}
    step = [
        {
            "model_name": "vision_encoder",
            "model_version": -1,
            "input_map": {t.name: t.name for t in encoder.inputs},
            "output_map": between,
        },
        {
            "model_name": "projector",
            "model_version": -1,
            "input_map": between,
            "output_map": {t.name: t.name for t in projector.outputs},
        },
    ]
    inputs, outputs = _tensors(encoder.inputs), _tensors(projector.outputs)
    _write_config(root, "image_features", inputs, outputs, platform="ensemble", ensemble_scheduling={"step": step})
    # Triton wants a folder of this version, and folders without files do not survive copies.
    (root / "image_features" / "1").mkdir()
    (root / "image_features" / "1" / ".keep").touch()


def _write_vlm(
    root: Path,
    parts: Mapping[str, PartFile],
    limits: TrtLimits,
    eos_token_ids: Sequence[int],
    merge: MergeSpec,
    *,
    keeps_cache: bool,
) -> None:
    decoder = {t.name: t for t in parts["decoder"].inputs}
    pasts = [t for t in decoder.values() if t.name.startswith("past_key_values.")]
    _, heads, slots, head_dim = pasts[0].dims
    values = {
        "image_token_id": str(merge.image_token_id),
        "eos_token_ids": json.dumps(list(eos_token_ids)),
        "max_seq": str(slots),
        "max_prompt": str(limits.prompt),
        "default_max_tokens": str(DEFAULT_MAX_TOKENS),
        "embeds_dtype": decoder["inputs_embeds"].dtype,
        "kv_layers": str(len(pasts) // 2),
        "kv_heads": str(heads),
        "kv_head_dim": str(head_dim),
        "kv_dtype": pasts[0].dtype,
        "decoder_keeps_cache": "true" if keeps_cache else "false",
    }
    int64 = TYPES["int64"][1]
    inputs = [
        {"name": "input_ids", "data_type": int64, "dims": [-1]},
        {"name": "max_tokens", "data_type": int64, "dims": [1], "optional": True},
        *({**tensor(spec), "optional": True} for spec in parts["vision_encoder"].inputs),
    ]
    outputs = [{"name": "token_ids", "data_type": int64, "dims": [-1]}]
    fields: dict[str, Any] = {
        "backend": "python",
        "parameters": parameters(values),
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
    }
    _write_config(root, "vlm", inputs, outputs, **fields)
    _write_code(root, "vlm", template("triton_vlm.py"))


def _tensors(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [tensor(spec) for spec in specs]


def _write_config(root: Path, name: str, inputs: Any, outputs: Any, **fields: Any) -> None:
    (root / name).mkdir(exist_ok=True)
    config = model_config(name=name, input=inputs, output=outputs, **fields)
    (root / name / "config.pbtxt").write_text(config_text(config), encoding="utf-8")


def _write_code(root: Path, name: str, code: str) -> None:
    target = root / name / "1" / "model.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(code, encoding="utf-8")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _readme(backend: Backend, limits: TrtLimits, parts: Mapping[str, PartFile]) -> str:
    pixels = ", ".join(f"`{t.name}`" for t in parts["vision_encoder"].inputs)
    values = {
        "pixels": pixels,
        "default": DEFAULT_MAX_TOKENS,
        "version": VERSIONS["trt"],
        **asdict(limits),
    }
    serves = template(f"triton_{backend}.md").format(**values).strip()
    return template("triton_readme.md").format(serves=serves, **values)
