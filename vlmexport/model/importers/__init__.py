"""Importers: an already quantized Hugging Face checkpoint keeps its codes. One module per format, named here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmexport.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlmexport.model.importers.packed import PackedCheckpoint
    from vlmexport.model.importers.stored import StoredTensors

# ``quant_method`` of config.json -> module below this package, with ``read(config, stored) -> PackedCheckpoint``.
IMPORTERS = {
    "awq": "awq",
    "bitsandbytes": "bnb",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
}


def check_method(folder: str, quantization: Any) -> None:
    """Refuse a ``quantization_config`` that no importer reads, with the list of those that are read."""
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    if not isinstance(method, str) or method not in IMPORTERS:
        raise UnsupportedModelError(
            f"{folder} is already quantized (method {method}); codes are kept from {', '.join(IMPORTERS)} checkpoints, "
            "otherwise give the original weights"
        )


def read_packed(quantization: Mapping[str, Any], stored: StoredTensors) -> PackedCheckpoint:
    """The packed weights that `quantization` (of a method that `check_method` let through) says `stored` holds.

    Raises `BadInputError` for tensors that are not what the config says, `UnsupportedModelError` for a variant of the
    format whose codes cannot be kept.
    """
    module = importlib.import_module(f"{__name__}.{IMPORTERS[quantization['quant_method']]}")
    packed: PackedCheckpoint = module.read(quantization, stored)
    return packed
