"""The ``genai`` layout's name, and the options that onnxruntime-genai has no place for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.dtypes import WEB_LAYOUT
from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from vlmexport.plan import OnnxOptions

GENAI_LAYOUT = "genai"
# Layouts whose vision encoder holds the projector.
JOINED_LAYOUTS = (WEB_LAYOUT, GENAI_LAYOUT)


def check_genai_options(options: OnnxOptions) -> None:
    """Raise `BadInputError` for options that the ``genai`` layout has no place for; other layouts pass."""
    if options.layout != GENAI_LAYOUT:
        return
    fixed = (
        (options.attention, "gqa", "--attention"),
        (options.kv_cache, "same", "--kv-cache"),
        (options.prefill, "same", "--prefill"),
    )
    for value, only, flag in fixed:
        if value != only:
            raise BadInputError(f"{flag} {value}: onnxruntime-genai runs only {flag} {only}")
    if options.preprocessor:
        raise BadInputError("--with-preprocessor: onnxruntime-genai prepares pictures by itself")
