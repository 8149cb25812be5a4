"""What every checkpoint format must say: the tensors of one weight, the config, and the files' metadata."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vlmexport.checkpoint_plan import CheckpointPlan
from vlmexport.errors import BadInputError
from vlmexport.lower.checkpoint.names import Names
from vlmexport.quantize.registry import IMPORTED
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import DecoderWeights

# Format -> module with `layout(subject) -> Layout`; imported when used.
_MODULES = {
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "awq": "awq",
    "bnb-nf4": "bnb",
    "torchao": "torchao",
}


@dataclass(frozen=True)
class Subject:
    """What a layout is made for; `dtype` is the checkpoint's (``bfloat16``)."""

    plan: CheckpointPlan
    weights: DecoderWeights
    names: Names
    dtype: str

    def untouched_modules(self) -> list[str]:
        """Every module that a loader must leave as it is, by each name that a loader may know it by; sorted."""
        kept = [f"{module}.weight" for module in self.plan.unquantized_linears]
        packed = {key for key, place in self.names.experts.items() if place.weight in self.plan.schemes}
        stacked = [name for name in self.names.converted if name.endswith(".weight") and name not in packed]
        return sorted({*self.names.modules(kept), *self.names.modules(stacked)})


class Layout(Protocol):
    """One format for one model."""

    def pack(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
        """The tensors that stand for the weight `name` (in the model), by what follows the module's name in the files.

        Raises `BadInputError` for a weight that the format cannot hold, naming it and the limit.
        """
        ...

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of ``config.json``."""
        ...

    def metadata(self) -> dict[str, str]:
        """What the weight files' headers must say; asked for after the last `pack`."""
        ...


def make_layout(subject: Subject) -> Layout:
    """The layout of the plan's format."""
    module = importlib.import_module(f"vlmexport.lower.checkpoint.{_MODULES[subject.plan.options.format]}")
    made: Layout = module.layout(subject)
    return made


def zero_points(tensor: QuantizedTensor) -> torch.Tensor:
    """Zero points uint8 of the scale's shape, the middle where the tensor is symmetric."""
    if tensor.zero_point is not None:
        return tensor.zero_point
    return torch.full(tensor.scale.shape, 1 << (tensor.bits - 1), dtype=torch.uint8, device=tensor.codes.device)


def check_packable(name: str, size: int, axis: str, multiple: int, format_name: str, scheme: QuantScheme) -> None:
    """Raise `BadInputError` when `size` features do not fill whole words."""
    if size % multiple:
        # Codes that came with a checkpoint have no floats to go back to.
        keep = "" if scheme.algorithm == IMPORTED else f"leave it alone with --keep '{name}' or "
        raise BadInputError(
            f"{name} has {size} {axis} features; {format_name} packs {multiple} into whole words, so it cannot hold "
            f"this layer: {keep}use --format compressed-tensors"
        )
