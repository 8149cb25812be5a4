"""What an emitter hands back: the graphs it wrote and the fate of every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmexport.manifest import KeptTensor, PartFile, QuantizedRecord


@dataclass(frozen=True)
class Emitted:
    """The parts of an export by role, its quantized tensors, and every weight that was kept, with the reason.

    `cache_digest` is the `scales_digest` of an INT8 key-value cache, None for a cache of floats. `prefill` is what the
    manifest says of a prompt graph, None without one. `facts` are what the layout adds to the manifest's ``model``,
    `root_files` texts by name that take the place of the model's own files.
    """

    parts: dict[str, PartFile]
    quantized: tuple[QuantizedRecord, ...]
    unquantized: tuple[KeptTensor, ...]
    cache_digest: str | None = None
    prefill: dict[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    root_files: Mapping[str, str] = field(default_factory=dict)
