"""`ExportPlan`: what an export will do to every weight, decided before any work is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmexport.quantize.scheme import QuantScheme

Action = Literal["quantize", "keep"]


@dataclass(frozen=True)
class OnnxOptions:
    """The choices of ``vlmexport onnx``; None means the target's default.

    `scheme` None keeps the decoder's weights at `decoder_dtype` (``--quant none``). `keep` are `fnmatch` patterns of
    weight names that stay unquantized.
    """

    target: str = "cpu"
    layout: str = "split"
    scheme: QuantScheme | None = field(default_factory=QuantScheme)
    encoder_dtype: Literal["fp16", "fp32"] | None = None
    decoder_dtype: Literal["fp16", "fp32"] | None = None
    lm_head: Literal["quantized", "fp16"] = "quantized"
    attention: Literal["gqa", "standard"] = "gqa"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightPlan:
    """What happens to one weight: quantized with `scheme`, or kept as `dtype` for `reason`.

    `name` is the name in the PyTorch model, `part` the part's role, `shape` the checkpoint's shape;
    byte counts are of the checkpoint (`bytes_before`) and of the export (`bytes_after`).
    """

    name: str
    part: str
    shape: tuple[int, ...]
    action: Action
    dtype: str
    reason: str
    scheme: QuantScheme | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ExportPlan:
    """Family x options x target, resolved per weight."""

    architecture: str
    options: OnnxOptions
    encoder_dtype: str
    decoder_dtype: str
    weights: tuple[WeightPlan, ...]

    def weight(self, name: str) -> WeightPlan:
        """The plan of one weight; KeyError when the plan does not know it (every weight must be planned)."""
        return {w.name: w for w in self.weights}[name]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return dataclasses.asdict(self)
