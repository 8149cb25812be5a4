"""What an emitter hands back: the graphs it wrote and the fate of every weight."""

from __future__ import annotations

from dataclasses import dataclass

from vlmexport.manifest import KeptTensor, PartFile, QuantizedRecord


@dataclass(frozen=True)
class Emitted:
    """The parts of an export by role, its quantized tensors, and every weight that was kept, with the reason."""

    parts: dict[str, PartFile]
    quantized: tuple[QuantizedRecord, ...]
    unquantized: tuple[KeptTensor, ...]
