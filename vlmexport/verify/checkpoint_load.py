"""Does transformers load a quantized checkpoint, and compute what the original computes with the dequantized codes?"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmexport.checkpoint_manifest import CheckpointManifest, FoldedTensor, StoredWeight
from vlmexport.model.calling_transformers import quiet_transformers
from vlmexport.model.remote import loading_class
from vlmexport.verify.checkpoint_codes import WeightFiles, read_checkpoint_codes
from vlmexport.verify.gates import Gate, NotRunError
from vlmexport.verify.inputs import draw_picture
from vlmexport.verify.metrics import Array, output_fault

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

# What transformers 5.23 imports to load each method, by the name it is imported under.
_PACKAGES = {
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao",),
}
# compressed-tensors casts scales to the dtype it is loaded in, so bfloat16 would round them.
_LOAD_DTYPES = {"compressed-tensors": torch.float32}
# gptqmodel's CPU kernels are compiled for minutes at first use and have their own arithmetic: no limit was proven here.
_UNJUDGED = {
    "gptq": "transformers loads it with optimum and gptqmodel (torch >= 2.14), whose kernels are not judged here",
    "awq": "transformers loads it with gptqmodel (torch >= 2.14), whose kernels are not judged here",
}
# float32 on both sides, the same weights to the bit: what is left is the order of sums.
_LIMIT = 1e-5
_MATRIX_AXES = 2
_CHECKS = {"processor/inputs": "processor", "transformers/as_shipped": "decoder", "transformers/logits": "decoder"}
_PROMPT = "What differs between the two images?"
# What transformers and the libraries below it raise when they cannot load or run a checkpoint.
_LOAD_ERRORS = (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError)


def check_load(
    gate: Gate,
    folder: Path,
    model: str,
    manifest: CheckpointManifest,
    *,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Compare the logits of two images and a question, in float32, at every position.

    The checkpoint is also loaded without any argument, as a user would, and must give finite logits.
    Activations are not quantized on either side (W8A8 and FP8 schemes): how they are rounded is the runtime's own
    matter, and what the checkpoint holds is the weights.
    """
    try:
        method = _check_possible(folder, manifest)
    except NotRunError as error:
        for name, part in _CHECKS.items():
            gate.not_run(name, part, "lowering", str(error))
        return
    with gate.guard("transformers/logits", "decoder", "lowering"):
        inputs, wanted = _reference_logits(gate, folder, model, lora, manifest, trust_remote_code)
        gc.collect()
        try:
            shipped = _run(_load(folder, "auto", trust_remote_code), inputs)
            value = _exact_logits(folder, method, inputs, trust_remote_code)
        except _LOAD_ERRORS as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            gate.fail("transformers/load", "decoder", "lowering", text)
            return
        fault = output_fault(wanted, shipped)
        gate.verdict("transformers/as_shipped", "decoder", "lowering", [fault] if fault else [], "faults")
        gate.close("transformers/logits", "decoder", "lowering", wanted, value, _LIMIT)


def _check_possible(folder: Path, manifest: CheckpointManifest) -> str:
    """The quantization method of the checkpoint; raises `NotRunError` when it cannot be loaded here."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    method = str(config["quant_method"])
    if method in _UNJUDGED:
        raise NotRunError(_UNJUDGED[method])
    if method == "compressed-tensors" and any(w.expert is not None for w in manifest.quantized):
        _check_experts(config, manifest)
    missing = [name for name in _PACKAGES[method] if importlib.util.find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        raise NotRunError(f"transformers needs {needed} to load it, not installed here")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if stored * 8 > free:  # 4 bits become 32
        raise NotRunError(f"the model in float32 needs about {stored * 8 / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    return method


def _check_experts(config: dict[str, Any], manifest: CheckpointManifest) -> None:
    """Raise `NotRunError` for packed experts in a form that transformers 5.23 does not dequantize while loading."""
    formats = {group["format"] for group in config["config_groups"].values()}
    if len(config["config_groups"]) > 1:
        raise NotRunError("transformers takes one scheme for all experts and one for all else, whatever is named")
    packed = [w for w in manifest.plan["weights"] if len(w["shape"]) > _MATRIX_AXES]
    if any(w["reason"].startswith("--keep") for w in packed):
        raise NotRunError("transformers dequantizes all packed experts or none, and some were kept")
    if "int-quantized" in formats:
        raise NotRunError("transformers has no way to load INT8 (W8A8) weights into packed experts")


def _reference_logits(
    gate: Gate, folder: Path, model: str, lora: str | None, manifest: CheckpointManifest, trust_remote_code: bool
) -> tuple[dict[str, torch.Tensor], Array]:
    """Inputs, and float32 logits of the original with the checkpoint's own weights."""
    from transformers import AutoProcessor

    from vlmexport.model.load import load_vlm
    from vlmexport.runtime.torch import TorchRunner
    from vlmexport.split.examples import load_processor

    vlm = load_vlm(model, lora=lora, trust_remote_code=trust_remote_code)
    whole: Any = vlm.model
    whole.float()
    inputs = _inputs(vlm, load_processor(vlm))
    written = _inputs(vlm, AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code))
    differing = [name for name in inputs if name not in written or not torch.equal(inputs[name], written[name])]
    gate.verdict("processor/inputs", "processor", "lowering", differing, "inputs that differ")
    stored = _stored_weights(folder, manifest, dict(whole.named_parameters()))
    with TorchRunner(vlm).substituted(stored), torch.inference_mode():
        logits: Array = whole(**inputs).logits.numpy()
    return inputs, logits


def _inputs(vlm: VLM, processor: Any) -> dict[str, torch.Tensor]:
    from vlmexport.split.examples import example_inputs

    pictures = [draw_picture(64, 64, 4), draw_picture(96, 48, 5)]
    try:
        return example_inputs(vlm, processor, pictures, _PROMPT)
    except ValueError:  # a processor that takes one image only
        return example_inputs(vlm, processor, pictures[:1], _PROMPT)


def _stored_weights(
    folder: Path, manifest: CheckpointManifest, originals: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """What the checkpoint holds in place of the `originals`, by name in the model.

    Rows of experts that neither the codes nor the floats of the checkpoint hold are NaN, so that logits show them.
    Where the config tells transformers to dequantize while loading, it multiplies in the scales' own dtype (float16).
    """
    files = WeightFiles(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    at_once = bool(config.get("dequantize"))
    found: dict[str, torch.Tensor] = {}

    def put(place: StoredWeight | FoldedTensor, weight: torch.Tensor) -> None:
        if place.expert is None:
            found[place.name] = weight
            return
        if place.name not in found:
            found[place.name] = torch.full_like(originals[place.name], torch.nan)
        found[place.name][place.expert, place.first_row : place.first_row + weight.shape[0]] = weight

    for folded in manifest.folded:
        put(folded, files(folded.file_name))
    for record, tensor, _ in read_checkpoint_codes(folder, manifest):
        if tensor is not None:
            weight = tensor.dequantize()
            put(record, weight.to(tensor.scale.dtype).float() if at_once else weight)
    return found


def _load(folder: Path, dtype: Any, trust_remote_code: bool) -> Any:
    """The checkpoint as transformers loads it; ValueError when a tensor is missing or has no place."""
    load: Any = loading_class(folder, trust_remote_code=trust_remote_code).from_pretrained
    with quiet_transformers():
        model, info = load(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    lost = sorted({*info.get("missing_keys", ()), *info.get("unexpected_keys", ())})
    if lost:
        raise ValueError(f"{len(lost)} tensors are missing or unexpected, first {lost[0]}")
    return model.eval()


def _run(model: Any, inputs: dict[str, torch.Tensor]) -> Array:
    with quiet_transformers(), torch.inference_mode():  # compressed-tensors decompresses at the first call
        logits: Array = model(**inputs).logits.float().numpy()
    return np.ascontiguousarray(logits)


def _exact_logits(folder: Path, method: str, inputs: dict[str, torch.Tensor], trust_remote_code: bool) -> Array:
    """Logits with every product in float32."""
    model = _load(folder, _LOAD_DTYPES.get(method, "auto"), trust_remote_code)
    _to_float32(model)
    if method in _EXACT:
        _EXACT[method](model)
    return _run(model, inputs)


def _to_float32(model: Any) -> None:
    """Every float of `model` to float32 in place, quantized tensors' own floats included.

    Not always by ``from_pretrained(dtype=torch.float32)``: transformers 5.23 then leaves the unquantized weights of
    bitsandbytes and torchao checkpoints in the dtype of the file.
    """
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                changed = tensor.detach().to(torch.float32)
                setattr(module, name, torch.nn.Parameter(changed, False) if name in module._parameters else changed)


def _exact_bitsandbytes(model: Any) -> None:
    """Dequantize and multiply in float32: by itself it uses the checkpoint's dtype, or a bfloat16 CPU kernel."""
    linear = importlib.import_module("bitsandbytes.nn").Linear4bit
    for module in model.modules():
        if isinstance(module, linear):
            module.weight.quant_state.dtype = torch.float32
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False


def _exact_compressed_tensors(model: Any) -> None:
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            scheme.input_activations = None


def _exact_torchao(model: Any) -> None:
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if weight is not None and getattr(weight, "act_quant_kwargs", None) is not None:
            weight.act_quant_kwargs = None


_EXACT: dict[str, Callable[[Any], None]] = {
    "bitsandbytes": _exact_bitsandbytes,
    "compressed-tensors": _exact_compressed_tensors,
    "torchao": _exact_torchao,
}
