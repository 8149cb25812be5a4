"""Emitters: parts and quantized weights become the files of one format. Packing lives here only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from vlmexport.lower.result import Emitted

# Format and layout -> module and function; imported when used, import errors propagate.
_SPLIT = ("vlmexport.lower.onnx.layouts.split", "emit_split")
_WEB = ("vlmexport.lower.onnx.layouts.transformersjs", "emit_transformersjs")
_GENAI = ("vlmexport.lower.onnx.layouts.genai", "emit_genai")
_EMITTERS = {
    ("onnx", "split"): _SPLIT,
    ("onnx", "tensorrt"): _SPLIT,
    ("onnx", "transformersjs"): _WEB,
    ("onnx", "genai"): _GENAI,
}


def emitter(format_name: str, layout: str) -> Callable[..., Emitted]:
    """The function ``(vlm, split, plan, target, weights, folder, progress) -> Emitted`` that writes this layout."""
    if (format_name, layout) not in _EMITTERS:
        known = ", ".join(f"{f}/{name}" for f, name in _EMITTERS)
        raise BadInputError(f"there is no emitter for {format_name}/{layout}; known: {known}")
    module, function = _EMITTERS[format_name, layout]
    found: Any = getattr(importlib.import_module(module), function)
    return found  # type: ignore[no-any-return]
