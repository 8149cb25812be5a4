"""The original model in PyTorch FP32: loaded, split, and given the artifact's own weights for the lowering question."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.manifest import FOLDED_NAME, Artifact, Manifest, file_sha256
from vlmexport.model.kv import KVGeometry
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.decoder import text_decoder
from vlmexport.split.matrices import PACKED_AXES

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

_HALF_NAMES = ("fp16", "float16")


@dataclass(frozen=True)
class Reference:
    """The original model (in float32) and its runner."""

    vlm: VLM
    runner: TorchRunner

    @property
    def kv(self) -> KVGeometry:
        """What its decoder keeps from token to token."""
        split = self.runner.split
        return self.vlm.facts.kv if split is None else split.kv

    def decoder_parameters(self) -> list[frozenset[str]]:
        """All names of each parameter that the decoder graph must hold; several names when it is tied.

        The token embedding inside the decoder module is a part of its own; the LM head counts to the decoder. A
        parameter with three axes may be there as a whole or as its experts' matrices, all of them.
        """
        model: Any = self.vlm.model
        decoder, head = text_decoder(model), model.get_output_embeddings()
        table = model.get_input_embeddings().weight
        inside = [p for p in decoder.parameters() if p is not table]
        owned = {id(p): p for p in [*inside, *head.parameters()]}
        names: dict[int, set[str]] = {key: set() for key in owned}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in owned:
                names[id(parameter)].add(name)
        return [every for key, found in names.items() for every in _with_experts(owned[key], frozenset(found))]

    def with_exported_weights(
        self, codes: Mapping[str, QuantizedTensor], artifact: Artifact
    ) -> AbstractContextManager[None]:
        """Within the ``with`` block the model runs the weights that the export stores.

        Quantized ones are the dequantized codes; floats that calibration changed come from the export's own file of
        them; kept ones that the manifest calls float16 are rounded to it.
        """
        manifest, folded = artifact.manifest, folded_weights(artifact)
        known = dict(self.vlm.model.named_parameters(remove_duplicate=False))
        halves = [kept.name for kept in manifest.unquantized if kept.dtype in _HALF_NAMES and kept.name in known]
        stored = {**{name: known[name].detach() for name in halves}, **folded}
        weights = {name: t.to(torch.float16).float() if name in halves else t for name, t in stored.items()}
        return self.runner.substituted({**weights, **{name: codes[name].dequantize() for name in codes}})


def _with_experts(parameter: torch.Tensor, names: frozenset[str]) -> list[frozenset[str]]:
    """`names`, for each expert with that expert's own where `parameter` may hold some."""
    if parameter.ndim != PACKED_AXES:
        return [names]
    return [names | {f"{name}.{expert}" for name in names} for expert in range(parameter.shape[0])]


def folded_weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The floats that calibration changed, by name, from the export's own file of them; empty where there is none."""
    from safetensors.torch import load_file

    if FOLDED_NAME not in artifact.manifest.files:
        return {}
    found: dict[str, torch.Tensor] = load_file(artifact.path / FOLDED_NAME)
    return found


def original_source(manifest: Manifest, model: str | None, lora: str | None) -> tuple[str, str | None]:
    """The model to compare with and the adapter to merge into it: each that asked for, or the export's own."""
    source = manifest.source
    return model or str(source.get("model", "")), lora or (source.get("lora") or {}).get("path")


def load_reference(
    model: str, *, lora: str | None = None, trust_remote_code: bool = False, embeddings: bool = False
) -> Reference:
    """Load and split the original model in float32, with the adapter `lora` merged in the checkpoint's dtype.

    One that gives `embeddings` instead of text is refused where that is False. Raises `BadInputError` when it cannot be
    loaded here.
    """
    from vlmexport.model.load import load_vlm
    from vlmexport.split.capture import split_model

    vlm = load_vlm(model, lora=lora, trust_remote_code=trust_remote_code, embeddings=embeddings)
    model_in_any_dtype: Any = vlm.model
    model_in_any_dtype.float()
    return Reference(vlm, TorchRunner(vlm, split_model(vlm)))


def changed_source_files(manifest: Manifest, vlm: VLM) -> list[str]:
    """Files of the export's source model and adapter that are missing in those of `vlm` or have other bytes."""
    made_with = manifest.source.get("lora")
    faults = _changed_files(manifest.source.get("files", {}), vlm.path)
    if (made_with is None) != (vlm.lora is None):
        faults.append(
            f"the export was made {'without' if made_with is None else 'with'} a LoRA adapter, the reference was not"
        )
    elif made_with is not None and vlm.lora is not None:
        faults += _changed_files(made_with["files"], vlm.lora.path)
    return faults


def _changed_files(files: Mapping[str, str], folder: Path) -> list[str]:
    faults = []
    for name, digest in sorted(files.items()):
        if not (folder / name).is_file():
            faults.append(f"{name} is missing in {folder}")
        elif file_sha256(folder / name) != digest:
            faults.append(f"{name} is not the file that was exported")
    return faults
